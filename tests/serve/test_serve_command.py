"""`arr-fast serve`: what its options become."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from arr_fast.cli import app, options
from arr_fast.serve import server


@pytest.fixture
def started(monkeypatch) -> dict[str, Any]:
    """What would have been started."""
    seen: dict[str, Any] = {}

    def load_judge(choice, **engine):
        seen.update(choice=choice, engine=engine)

    def make_server(judge, settings):
        seen.update(settings=settings)
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr(options, "load_judge", load_judge)
    monkeypatch.setattr(server, "make_server", make_server)
    return seen


def serve(*words: str) -> Any:
    return CliRunner().invoke(app, ["serve", *words])


def test_cache_budgets_reach_the_judge(started):
    assert serve("--image-cache-mb", "64", "--prefix-cache-mb", "0").exit_code == 0
    assert started["engine"] == {"feature_cache_bytes": 64 << 20, "prefix_cache_bytes": 0}
    assert serve().exit_code == 0
    assert started["engine"] == {}


def test_limits_reach_the_settings(started):
    words = ["--max-queue", "3", "--max-body-mb", "2", "--allow-url", "https://x.org/a/"]
    assert serve(*words, "--token", "a-long-token").exit_code == 0
    settings = started["settings"]
    assert (settings.max_queued_requests, settings.max_body_bytes) == (3, 2 << 20)
    assert settings.url_prefixes == ("https://x.org/a/",) and settings.token == "a-long-token"
    assert settings.host == "127.0.0.1" and not settings.pickle
    assert settings.max_open_body_bytes == 256 << 20


def test_two_of_the_longest_bodies_can_be_held(started):
    assert serve("--max-body-mb", "300").exit_code == 0
    settings = started["settings"]
    assert settings.max_body_bytes == 300 << 20 and settings.max_open_body_bytes == 600 << 20


def test_pickle_away_from_loopback_is_one_line_of_error(started):
    found = serve("--pickle", "--host", "0.0.0.0")
    assert found.exit_code == 1 and "settings" not in started
    assert "loopback" in found.output
