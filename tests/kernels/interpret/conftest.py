"""The interpreter replaces `triton.jit` at import, so these tests need a process of their own with
TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test here `interpret`; outside the interpreter they are skipped, see
    tests/kernels/test_tiers.py."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.interpret)
            if os.environ.get("TRITON_INTERPRET") != "1":
                item.add_marker(
                    pytest.mark.skip(
                        reason="needs TRITON_INTERPRET=1 set before triton is imported"
                    )
                )
