"""Runs the toy trainer in a process of its own.

python -m tests.rpo.toy_run killed OUT N AT       kill -9 itself in the middle of iteration AT
python -m tests.rpo.toy_run gradients OUT         one update; gradients go to OUT/gradients-RANK.pt
python -m tests.rpo.toy_run shapes OUT BASE KIND  a run on a shapes generator, split over the ranks
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from arr_fast.rpo.building import build_policy
from arr_fast.rpo.checkpoint import list_checkpoints, load_checkpoint
from arr_fast.rpo.prompts import Prompt, load_prompts
from arr_fast.rpo.sharding import is_split, whole
from arr_fast.rpo.trainer import Parts, Trainer
from tests.rpo.toy import bright_judge, mean_brightness, toy_config, toy_parts


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


def shapes(out: Path, base: str, kind: str) -> None:
    """Two iterations on a small shapes generator with a checkpoint after each, and two more after
    resuming from the first. The last weights go to OUT/KIND.pt, what the resumed run ends with to
    OUT/KIND-resumed.pt.

    Args:
        out: Where runs and weights go.
        base: Directory of the generator.
        kind: "lora" or "full"; with "-whole" the network is not split, with "-compiled" it is
            split and compiled block by block.
    """
    trained, *how = kind.split("-")
    run_dir = out / kind
    config = toy_config(
        run_dir,
        iterations=2,
        shard="whole" not in how,
        compile="compiled" in how,
        checkpoint={"every": 1, "keep": 9},
        policy={
            "kind": "shapes",
            "model": base,
            "lora": {"rank": 2} if trained == "lora" else None,
        },
        optimiser={"lr": 1e-3},
        loss={"beta": 0.1},
        evaluation={"every": 2},
    )

    def trainer() -> Trainer:
        policy = build_policy(config, "cpu")
        held = [Prompt(0, "a red circle and a blue star on a white background")]
        rows = load_prompts("builtin:shapes", count=20, seed=0)
        judges = {"rubric": bright_judge}
        return Trainer(config, Parts(policy, judges, rows, held, mean_brightness))

    def weights(run: Trainer) -> dict:
        state = {n: p.detach() for n, p in run.updater.parameters.items()}
        assert any(map(is_split, run.policy.networks()[0].parameters())) == config.shard
        means = run.updater.state()["ema"]["means"]
        return whole({"trained": state, "means": means}, keep=True)

    straight = trainer()
    straight.train()
    torch.save(weights(straight), out / f"{kind}-{straight.ranks.own}.pt")
    resumed = trainer()
    resumed.resume(load_checkpoint(list_checkpoints(run_dir)[0]))
    resumed.train()
    torch.save(weights(resumed), out / f"{kind}-resumed-{resumed.ranks.own}.pt")


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    arguments = [int(each) if each.isdigit() else each for each in rest]
    run = {"killed": killed, "gradients": gradients, "shapes": shapes}[what]
    run(Path(where), *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
