"""One tiny judge and one running server for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from arr_fast.judge import Judge
from tests.serve.running import MODEL, Running, running


@pytest.fixture(scope="session")
def judge() -> Judge:
    return Judge.from_pretrained(MODEL, device="cpu")


@pytest.fixture(scope="session")
def server(judge: Judge) -> Iterator[Running]:
    with running(judge, pickle=True) as run:
        yield run
