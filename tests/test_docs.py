"""The pages stay true: their code parses or runs, their commands and options exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from arr_fast.cli import app
from arr_fast.rubric import Rubric
from tests.integrations.rankers import BrightnessRanker

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(path.read_text("utf-8")) if name == language]


def commands() -> list[tuple[str, str]]:
    return [
        (page.name, line.split("  #")[0].strip())
        for page in (*PAGES, ROOT / "README.md")
        for text in blocks(page, "")
        for line in text.splitlines()
        if line.startswith("arr-fast ")
    ]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_of_the_pages_exist_with_their_options(page, line):
    del page
    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, words[0]
        command = command.commands[words.pop(0)]
    known = {
        name for parameter in command.params for name in parameter.opts + parameter.secondary_opts
    }
    given = {word for word in words if word.startswith("--")}
    assert given <= known, given - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_the_pages_parses(page):
    for text in blocks(page, "python"):
        ast.parse(text)


def test_the_rubric_of_the_page_loads(tmp_path):
    (text,) = blocks(ROOT / "docs" / "rubric.md", "yaml")
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    assert len(Rubric.load(tmp_path / "r.yaml").criteria) == 3


def test_a_training_loop_is_added_in_under_60_lines_that_run():
    (text,) = blocks(ROOT / "docs" / "add_a_loop.md", "python")
    assert len(text.splitlines()) < 60
    module: dict = {}
    exec(compile(text, "add_a_loop.md", "exec"), module)
    reward = module["make_reward"]("cpu", judge=BrightnessRanker())
    images = torch.from_numpy(np.array([10, 20, 30, 40, 255], np.float32) / 255)
    images = images[:, None, None, None].expand(5, 3, 8, 8)
    found = reward(images, ["x", "y", "x", "y", "y"])
    assert found.tolist() == [0.0, 0.0, 1.0, 1.0, 0.5]
