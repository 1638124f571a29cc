"""`arr-fast bench ...`: measurements side by side, gated on agreement."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Measure engines side by side, gated on agreement.")
