"""Trains the bundled generator: `python -m arr_fast.shapes.train_generator --out RUN [--resume]`.

Flow matching on rendered scenes at a CONSTANT learning rate, an average of the weights beside it.
What a step sees is a function of (seed, step, worker) alone, so a resumed run repeats a straight
one to the bit. The weights at 80 % and at the end are kept:

    python -m arr_fast.shapes.train_generator --out RUN --check-convergence 4000
    python -m arr_fast.shapes.train_generator --out RUN --bundle

`--init-from DIR --steps N` goes on from a saved generator, whose steps count. An editing generator
starts best from one for captions, which knows colours and shapes: `--task edit --init-from DIR`.
The bundled one went on twice, from easy pictures to those of the demo; its generator.json has the
last of the three runs:

    --out A --layout grid --wrong thing --steps 10000
    --out B --wrong thing --init-from A/last --steps 20000 --batch 12
    --out C --init-from B/last --steps 25000 --batch 12
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arr_fast.shapes import weights_directory
from arr_fast.shapes.generator import ShapesGenerator, word_ids
from arr_fast.shapes.generator_data import (
    GeneratorTask,
    Layout,
    Wrong,
    sample_item,
    sample_prompts,
)
from arr_fast.shapes.latents import TOKENS, PatchCode
from arr_fast.shapes.optimise import Optimiser
from arr_fast.shapes.parser import success
from arr_fast.shapes.render import render
from arr_fast.shapes.run_state import Curve, load_state, resumed_plan, save_state
from arr_fast.shapes.workers import Interrupted, average_gradients, start_or_say

logger = logging.getLogger(__name__)
CODE_PICTURES = 2000
# Share of the steps after which the first of the two compared weights is kept: of all steps, or of
# the run's own where it began later.
EARLIER = 0.8
# Euler steps of the sampler that judges a generator.
SAMPLER_STEPS = 6
# What a later part of a run may have otherwise than the first.
MAY_CHANGE = ("steps", "every", "check", "compile")
# Of the noise levels' log-odds: what a picture shows is decided at high ones.
NOISE_MEAN = 0.8


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does; stored with its checkpoints.

    Attributes:
        task: "t2i" or "edit".
        layout: Where objects stand; see `generator_data`.
        wrong: What the wrong quarter of the pictures shows; see `generator_data`.
        seed: Seeds weights and data.
        steps: Optimizer steps.
        batch: Pictures per step and worker.
        workers: Single-threaded processes that share every step.
        muon_lr, adam_lr: Constant learning rates after the warm-up.
        warmup: Steps of linear warm-up.
        ema: Decay of the averaged weights.
        every: Interval of logging, checking and saving, in steps.
        check: Held-out prompts of a check.
        compile: torch.compile the loss.
        begun_at: Steps that the weights had seen when the run began.
    """

    task: GeneratorTask = "t2i"
    layout: Layout = "columns"
    wrong: Wrong = "scene"
    seed: int = 0
    steps: int = 5000
    batch: int = 24
    workers: int = 2
    muon_lr: float = 0.01
    adam_lr: float = 1e-3
    warmup: int = 100
    ema: float = 0.998
    every: int = 250
    check: int = 100
    compile: bool = True
    begun_at: int = 0

    @property
    def earlier(self) -> int:
        """The step after which the first of the two compared weights is kept."""
        of_all = round(EARLIER * self.steps)
        if of_all > self.begun_at:
            return of_all
        return self.begun_at + round(EARLIER * (self.steps - self.begun_at))


def fit_code(seed: int, layout: Layout = "columns", wrong: Wrong = "scene") -> PatchCode:
    """The latents' code, from pictures of the training distribution."""
    rng = np.random.default_rng([seed, 7])
    items = [sample_item(rng, "t2i", layout, wrong) for _ in range(CODE_PICTURES)]
    return PatchCode.fit([render(item.target) for item in items])


Batch = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def draw_batch(
    rng: np.random.Generator,
    code: PatchCode,
    task: GeneratorTask,
    count: int,
    layout: Layout = "columns",
    wrong: Wrong = "scene",
) -> Batch:
    """What `flow_loss` reads: word ids [B, L], clean latents [B, 64, 48], source latents or None,
    logit-normal noise levels [B] (Esser et al., 2024) and noise [B, 64, 48]."""
    items = [sample_item(rng, task, layout, wrong) for _ in range(count)]
    ids = word_ids([item.text for item in items])
    clean = code.encode([render(item.target) for item in items])
    sources = [render(item.source) for item in items if item.source is not None]
    log_odds = NOISE_MEAN + rng.standard_normal(count, dtype=np.float32)
    sigma = torch.from_numpy(log_odds).sigmoid()
    noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32))
    return ids, clean, code.encode(sources) if sources else None, sigma, noise


def flow_loss(
    generator: ShapesGenerator,
    ids: Tensor,
    clean: Tensor,
    source: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
) -> Tensor:
    """Flow matching: mean (v - (noise - clean))^2 on the straight line between them."""
    mix = sigma.view(-1, 1, 1)
    noisy = (1 - mix) * clean + mix * noise
    conditions = generator.conditions(ids, source)
    velocity = generator.velocity(generator.transformer, noisy, sigma, conditions)
    return (velocity - (noise - clean)).square().mean()


@torch.no_grad()
def average(mean: ShapesGenerator, now: ShapesGenerator, decay: float, step: int) -> None:
    """Moves averaged weights towards the current ones; the start is forgotten soon."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for kept, fresh in zip(mean.parameters(), now.parameters(), strict=True):
        kept.lerp_(fresh, weight)


def continue_supervised(directory: Path, *, seconds: float, seed: int) -> ShapesGenerator:
    """Trains saved weights further on the same data, with a plan's own settings.

    Args:
        directory: Of a saved generator.
        seconds: Wall time to spend.
        seed: Of the data.

    Returns:
        The averaged weights.
    """
    plan = Plan(seed=seed)
    generator, code = ShapesGenerator.load(directory)
    averaged, _ = ShapesGenerator.load(directory)
    averaged.requires_grad_(False)
    named = list(generator.named_parameters())
    optimiser = Optimiser(named, muon_lr=plan.muon_lr, adam_lr=plan.adam_lr)
    began, step = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        rng = np.random.default_rng([seed, 13, step])
        flow_loss(generator, *draw_batch(rng, code, generator.task, plan.batch)).backward()
        optimiser.step(min(1.0, (step + 1) / plan.warmup))
        average(averaged, generator, plan.ema, step + 1000)
        step += 1
    return averaged


class Run:
    """One training run in a directory.

    Args:
        out: The directory.
        plan: What to do.
        resume: Go on from the state in `out`, if there is one.
        rank: Number of the worker.
        init_from: A saved generator whose averaged weights are the start.
    """

    def __init__(
        self, out: Path, plan: Plan, resume: bool, rank: int, init_from: Path | None = None
    ) -> None:
        self.out, self.plan, self.rank = out, plan, rank
        self.generator = ShapesGenerator(plan.task, plan.seed)
        self.averaged = ShapesGenerator(plan.task, plan.seed)
        saved = load_state(out / "state.pt") if resume else None
        if saved is None and init_from is None:
            self.code = fit_code(plan.seed, plan.layout, plan.wrong)
        elif saved is None and init_from is not None:
            trained, self.code = ShapesGenerator.load(init_from)
            for model in (self.generator, self.averaged):
                model.load_state_dict(trained.state_dict())
        self.averaged.requires_grad_(False)
        named = list(self.generator.named_parameters())
        self.optimiser = Optimiser(named, muon_lr=plan.muon_lr, adam_lr=plan.adam_lr)
        self.curve = Curve(out / "curve.csv")
        self.first = plan.begun_at
        self._stop = False
        self._loss: Callable[..., Tensor] = self._eager_loss
        if plan.compile:
            self._loss = torch.compile(self._eager_loss, dynamic=False)
        if saved is not None:
            self.code = PatchCode.from_tensors(saved["code"])
            self.generator.load_state_dict(saved["model"])
            self.averaged.load_state_dict(saved["averaged"])
            self.optimiser.restore(saved["optimiser"])
            self.first, self.curve.spent = saved["step"], saved["cpu_seconds"]
            if rank == 0:
                self.curve.truncate("flow", self.first)

    def _eager_loss(self, *batch: Any) -> Tensor:
        return flow_loss(self.generator, *batch)

    def request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Ends the run after the current step."""
        self._stop = True

    def train(self) -> None:
        """Runs the remaining steps."""
        plan, losses, norms = self.plan, [], []
        began = time.monotonic()
        for step in range(self.first, plan.steps):
            rng = np.random.default_rng([plan.seed, 11, step, self.rank])
            batch = draw_batch(rng, self.code, plan.task, plan.batch, plan.layout, plan.wrong)
            loss = self._loss(*batch)
            loss.backward()
            value, stop = average_gradients(
                self.optimiser.parameters, [float(loss.detach()), float(self._stop)]
            )
            norms.append(self.optimiser.step(min(1.0, (step + 1 - plan.begun_at) / plan.warmup)))
            average(self.averaged, self.generator, plan.ema, step)
            losses.append(value)
            done = step + 1
            is_kept = done in (plan.earlier, plan.steps)
            if self.rank == 0 and is_kept:
                name = "last" if done == plan.steps else "earlier"
                self.averaged.save(self.out / name, self.code, step=done, plan=asdict(plan))
            if done % plan.every and done != plan.steps and not stop:
                continue
            if self.rank == 0:
                scores = {
                    "success": float(
                        np.mean(held_out_success(self.averaged, self.code, plan.check))
                    )
                }
                means = {"loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms))}
                self.curve.add("flow", done, "train", means)
                self.curve.add("flow", done, "held_out", scores)
                self._save(done)
                pace = (time.monotonic() - began) / len(losses)
                text = " ".join(f"{k}={v:.4f}" for k, v in {**means, **scores}.items())
                logger.info("%d/%d %.2f s/step %s", done, plan.steps, pace, text)
            losses, norms, began = [], [], time.monotonic()
            if stop:
                raise Interrupted(f"stopped after step {done}")

    def _save(self, step: int) -> None:
        state: dict[str, Any] = {
            "model": self.generator.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state(),
            "step": step,
            "plan": asdict(self.plan),
            "code": self.code.tensors(),
            "cpu_seconds": self.curve.cpu_seconds(),
        }
        save_state(self.out / "state.pt", state)


def held_out_success(
    generator: ShapesGenerator,
    code: PatchCode,
    count: int,
    *,
    seed: int = 1234,
    steps: int = SAMPLER_STEPS,
) -> list[float]:
    """1.0 or 0.0 for each of `count` held-out prompts at fixed noise, by the pixel parser."""
    prompts = list(sample_prompts(count, seed=0, split="held_out", task=generator.task))
    found: list[float] = []
    for first in range(0, count, 100):
        part = prompts[first : first + 100]
        texts = [prompt.text for prompt in part]
        sources = [prompt.source for prompt in part if prompt.source is not None] or None
        draws = torch.Generator().manual_seed(seed + first)
        noise = torch.randn(len(part), *code_shape(code), generator=draws)
        before = None if sources is None else code.encode(sources)
        with torch.no_grad():
            conditions = generator.conditions(word_ids(texts), before)
        found += success(texts, code.decode(generator.sample(conditions, noise, steps)), sources)
    return found


def code_shape(code: PatchCode) -> tuple[int, int]:
    """Shape of one picture's latents."""
    return TOKENS, len(code.basis)


def check_convergence(out: Path, count: int) -> dict[str, float]:
    """What the last 20 % of the steps gained, on the same prompts and noise.

    Returns:
        Success at 80 % and at the end, and their paired difference with a 95 % interval.
    """
    scores = [
        np.array(held_out_success(*ShapesGenerator.load(out / name), count))
        for name in ("earlier", "last")
    ]
    gains = scores[1] - scores[0]
    half = 1.96 * float(gains.std(ddof=1)) / len(gains) ** 0.5
    gain = float(gains.mean())
    result = {
        "prompts": float(count),
        "success_earlier": float(scores[0].mean()),
        "success_last": float(scores[1].mean()),
        "gain": gain,
        "gain_low": gain - half,
        "gain_high": gain + half,
    }
    (out / "convergence.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def bundle(out: Path, task: GeneratorTask) -> Path:
    """Copies the last weights to where `builtin:` finds them."""
    target = weights_directory().parent / ("generator" if task == "t2i" else "generator_edit")
    shutil.copytree(out / "last", target, dirs_exist_ok=True)
    return target


def saved_step(directory: Path, task: GeneratorTask) -> int:
    """The steps behind a saved generator; 0 where they taught it another task."""
    about = json.loads((directory / "generator.json").read_text(encoding="utf-8"))
    return int(about["step"]) if about["task"] == task else 0


def work(rank: int, out: Path, plan: Plan, resume: bool, init_from: Path | None = None) -> None:
    """What every worker does."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run = Run(out, plan, resume, rank, init_from)
    signal.signal(signal.SIGTERM, run.request_stop)
    signal.signal(signal.SIGINT, run.request_stop)
    run.train()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    # What is not given is the plan's default, or what the run to be resumed has.
    absent = argparse.SUPPRESS
    parser.add_argument("--task", choices=("t2i", "edit"), default=absent)
    parser.add_argument("--layout", choices=("columns", "grid"), default=absent)
    parser.add_argument(
        "--wrong",
        choices=("scene", "thing"),
        default=absent,
        help="what a wrong picture of a caption shows: another scene, or one thing otherwise",
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--init-from", type=Path, help="directory of a saved generator")
    parser.add_argument("--no-compile", dest="compile", action="store_false", default=absent)
    parser.add_argument("--check-convergence", type=int, metavar="PROMPTS")
    parser.add_argument("--bundle", action="store_true")
    for name in ("seed", "steps", "batch", "workers", "every", "check", "warmup"):
        parser.add_argument(f"--{name}", type=int, default=absent)
    for name in ("muon_lr", "adam_lr", "ema"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=float, default=absent)
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Plan) if hasattr(args, f.name)}
    task: GeneratorTask = given.get("task", Plan().task)
    if args.check_convergence:
        for key, value in check_convergence(args.out, args.check_convergence).items():
            print(f"{key} {value:.4f}")
        return
    if args.bundle:
        print(bundle(args.out, task))
        return
    try:
        if args.resume:
            plan = Plan(**resumed_plan(args.out / "state.pt", given, MAY_CHANGE))
        else:
            begun_at = 0 if args.init_from is None else saved_step(args.init_from, task)
            plan = Plan(**given, begun_at=begun_at)
    except ValueError as error:
        parser.error(str(error))
    parts = (args.out, plan, args.resume, args.init_from)
    start_or_say(work, plan.workers, args.out / "meeting", *parts)


if __name__ == "__main__":
    main()
