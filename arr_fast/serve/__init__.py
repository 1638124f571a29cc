"""Serving a judge over HTTP: one engine thread behind a FastAPI application."""

from __future__ import annotations
