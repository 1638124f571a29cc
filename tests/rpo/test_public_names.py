"""The names that `arr_fast.rpo` offers."""

from __future__ import annotations

import pytest

from arr_fast import rpo


def test_every_public_name_loads() -> None:
    assert [name for name in rpo.__all__ if getattr(rpo, name) is None] == []
    assert dir(rpo) == rpo.__all__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        rpo.Nothing  # noqa: B018
