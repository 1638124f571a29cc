"""The interpreter replaces `triton.jit` at import: these tests need a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test here `aot`; under the interpreter they are skipped."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.aot)
            if os.environ.get("TRITON_INTERPRET") == "1":
                item.add_marker(pytest.mark.skip(reason="interpreted kernels cannot be compiled"))
