"""`python -m arr_fast` is the command `arr-fast`."""

from arr_fast.cli import app

app()
