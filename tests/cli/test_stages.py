"""Progress of long commands: a line per stage, a bar that is gone when its calls are done."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from arr_fast.cli.stages import Stages


def test_a_bar_stands_while_something_is_left_and_is_gone_afterwards() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    with Stages(console) as stages:
        stages.begin("generate: 4 [pairs]")
        stages.advance(1, 4)
        assert stages._bar is not None
        stages.advance(3, 4)
        (task,) = stages._bar.tasks
        assert (task.description, task.completed, task.total) == ("generate", 3, 4)
        stages.advance(4, 4)
        assert stages._bar is None
        stages.advance(0, 2)
        stages.begin("verify")
        assert stages._bar is None
    assert "4 [pairs]" in out.getvalue() and "verify" in out.getvalue()


def test_a_killed_stage_leaves_the_terminal_as_it_was() -> None:
    stages = Stages(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(KeyboardInterrupt), stages:
        stages.begin("evaluate")
        stages.advance(1, 9)
        raise KeyboardInterrupt
    assert stages._bar is None
