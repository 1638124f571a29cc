"""Short adapters between a judge and the training loops that people already run."""

from __future__ import annotations
