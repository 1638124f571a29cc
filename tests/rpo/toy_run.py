"""Runs the toy trainer in a process of its own.

python -m tests.rpo.toy_run killed OUT N AT       kill -9 itself in the middle of iteration AT
python -m tests.rpo.toy_run gradients OUT         one update; gradients go to OUT/gradients-RANK.pt
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from arr_fast.rpo.trainer import Trainer
from tests.rpo.toy import bright_judge, toy_config, toy_parts


def killed(out: Path, iterations: int, at: int) -> None:
    """Dies while iteration `at` is being judged."""
    calls = 0

    def judge(request):
        nonlocal calls
        calls += 1
        # Two chunks per iteration; the second one of iteration `at` never gets an answer.
        if calls == 2 * at:
            os.kill(os.getpid(), signal.SIGKILL)
        return bright_judge(request)

    config = toy_config(out, iterations=iterations, evaluation={"every": None})
    Trainer(config, toy_parts(judge)).train()


def gradients(out: Path) -> None:
    """One iteration; what the optimizer was given is saved."""
    trainer = Trainer(toy_config(out, loss={"beta": 0.5}), toy_parts())
    kept = {}

    def keep(optimizer, args, kwargs):
        kept.update({n: p.grad.clone() for n, p in trainer.updater.parameters.items()})

    trainer.updater.optimiser.register_step_pre_hook(keep)
    trainer.run_iteration()
    out.mkdir(parents=True, exist_ok=True)
    torch.save(kept, out / f"gradients-{trainer.ranks.own}.pt")


if __name__ == "__main__":
    what, where, *numbers = sys.argv[1:]
    run = {"killed": killed, "gradients": gradients}[what]
    run(Path(where), *map(int, numbers))
