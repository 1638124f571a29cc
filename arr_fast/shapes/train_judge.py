"""Trains the bundled judge: `python -m arr_fast.shapes.train_judge --out DIR [--resume]`.

Stage 1 teaches the vision tower words, stage 2 teaches the decoder captions and verdicts. What a
step sees is a function of (seed, stage, step) alone, so a resumed run repeats a straight one to the
bit on the same machine with the same number of workers.
"""

from __future__ import annotations

import argparse
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from arr_fast.shapes import judge_training, vision_pretraining
from arr_fast.shapes.forward import VisionForward
from arr_fast.shapes.model import build_model, turn_pictures
from arr_fast.shapes.optimise import Optimiser
from arr_fast.shapes.rows import BatchMaker
from arr_fast.shapes.run_state import Curve, load_state, resumed_plan, save_state
from arr_fast.shapes.tokenizer import build_tokenizer, domain_words
from arr_fast.shapes.workers import Interrupted, average_gradients, start_or_say

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does; stored with its checkpoints.

    Attributes:
        seed: Seeds weights and data.
        vision_steps: Steps of stage 1.
        vision_batch: Pictures per step and worker of stage 1.
        reading_steps: Steps of stage 2 on single pictures.
        reading_rows: Packed rows per step and worker of those.
        judge_steps: Steps of stage 2 on pairs, mostly on what they show of single objects.
        whole_steps: Last steps of stage 2, on whole captions and instructions.
        whole_peak: Their highest learning rate, as a share of stage 1's.
        judge_rows: Packed rows per step and worker of both.
        workers: Single-threaded processes that share every step.
        every: Interval of logging, checking and saving, in steps.
        vision_check: Held-out pictures of a check in stage 1.
        judge_check: Held-out rows of a check in stage 2.
    """

    seed: int = 0
    vision_steps: int = 2600
    vision_batch: int = 24
    reading_steps: int = 400
    reading_rows: int = 3
    judge_steps: int = 2200
    whole_steps: int = 11500
    whole_peak: float = 0.5
    judge_rows: int = 5
    workers: int = 2
    every: int = 200
    vision_check: int = 128
    judge_check: int = 64


def schedule(step: int, steps: int, warmup: int = 30, floor: float = 0.05) -> float:
    """Linear warm-up, constant, then a linear fall over the last 40 % of the steps."""
    fall = max(1, int(0.4 * steps))
    return min(1.0, (step + 1) / warmup, max(floor, (steps - step) / fall))


STAGES = ("vision", "reading", "judge", "whole")

# Verdicts are few per step and noisy, so their stage takes smaller steps.
PEAKS = {"vision": 1.0, "reading": 1.0, "judge": 0.6}

# In stage 2 what stage 1 taught must last (at half speed it was gone after a hundred steps): words
# and the tower move slowly, deepstack is new.
SLOWER = (("deepstack", 1.0), ("visual", 0.1), ("embed_tokens", 0.05))


class Run:
    """One training run in a directory: model, state, curve."""

    def __init__(self, out: Path, plan: Plan, resume: bool, rank: int) -> None:
        self.out, self.plan, self.rank = out, plan, rank
        self.tokenizer = build_tokenizer()
        self.model = build_model(self.tokenizer, plan.seed)
        self.model.train()
        self.vision = VisionForward(self.model)
        self.curve = Curve(out / "curve.csv")
        self.saved = load_state(out / "state.pt") if resume else None
        if self.saved is not None:
            self.model.load_state_dict(self.saved["model"])
            self.curve.spent = self.saved["cpu_seconds"]
            if rank == 0:
                self.curve.truncate(self.saved["stage"], self.saved["step"])
        self._stop = False

    def load(self, checkpoint: Path) -> None:
        """Takes the weights of a trained judge.

        Raises:
            FileNotFoundError: The directory has no model.safetensors.
        """
        weights = load_file(checkpoint / "model.safetensors")
        missing, unknown = self.model.load_state_dict(
            {name: value.float() for name, value in weights.items()}, strict=False
        )
        if unknown or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"{checkpoint} is not a judge of this shape: {missing} {unknown}")

    def word_ids(self) -> dict[str, int]:
        """The token of every domain word, with a space before it."""
        return {w: self.tokenizer.convert_tokens_to_ids("Ġ" + w) for w in domain_words()}

    def request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Ends the run after the current step."""
        self._stop = True

    def save(self, stage: str, step: int, extra: dict[str, object]) -> None:
        """Writes the state after `step` steps of a stage."""
        state = {
            "model": self.model.state_dict(),
            "stage": stage,
            "step": step,
            "plan": asdict(self.plan),
            "cpu_seconds": self.curve.cpu_seconds(),
            **extra,
        }
        save_state(self.out / "state.pt", state)

    def loop(
        self,
        stage: str,
        first: int,
        steps: int,
        optimiser: Optimiser,
        loss: Callable[[np.random.Generator], dict[str, torch.Tensor]],
        evaluate: Callable[[], dict[str, float]],
        extra: Callable[[], dict[str, object]],
    ) -> None:
        """Runs the steps of a stage; every `plan.every` of them it logs, evaluates and saves.

        Args:
            stage: Name in curve and state.
            first: Steps already done.
            steps: Steps in all.
            optimiser: Holds the trained parameters.
            loss: Maps a generator to named losses; "loss" is the one that is minimised.
            evaluate: Scores on held-out data; called by worker 0.
            extra: What the state holds beside the model.
        """
        number = STAGES.index(stage) + 1
        sums: dict[str, list[float]] = {}
        began = time.monotonic()
        for step in range(first, steps):
            rng = np.random.default_rng([self.plan.seed, number, step, self.rank])
            losses = loss(rng)
            losses["loss"].backward()
            values = [float(v.detach()) for v in losses.values()]
            *means, stop = average_gradients(optimiser.parameters, [*values, float(self._stop)])
            floor = 1.0 if stage == "reading" else 0.05
            peaks = {**PEAKS, "whole": self.plan.whole_peak}
            scale = peaks[stage] * schedule(step, steps, floor=floor)
            means.append(optimiser.step(scale))
            for name, value in zip([*losses, "grad_norm"], means, strict=True):
                sums.setdefault(name, []).append(value)
            done = step + 1
            if done % self.plan.every and done != steps and not stop:
                continue
            if self.rank == 0:
                mean = {k: float(np.mean(v)) for k, v in sums.items()}
                self.curve.add(stage, done, "train", mean)
                scores = evaluate()
                self.curve.add(stage, done, "held_out", scores)
                self.save(stage, done, extra())
                pace = (time.monotonic() - began) / len(sums["loss"])
                text = " ".join(f"{k}={v:.3f}" for k, v in {**mean, **scores}.items())
                logger.info("%s %d/%d %.2f s/step %s", stage, done, steps, pace, text)
            sums, began = {}, time.monotonic()
            if stop:
                raise Interrupted(f"stopped after step {done} of {stage}")


def train_vision(run: Run) -> None:
    """Stage 1."""
    plan, model = run.plan, run.model
    table: Any = model.get_input_embeddings().weight
    torch.manual_seed(plan.seed + 1)
    heads = vision_pretraining.CellHeads(table.detach().clone(), run.word_ids())
    named = [(n, p) for n, p in model.model.visual.named_parameters() if "deepstack" not in n]
    optimiser = Optimiser([*named, *heads.named_parameters()], muon_lr=0.015, adam_lr=1.5e-3)
    first = 0
    if run.saved is not None and run.saved["stage"] == "vision":
        first = run.saved["step"]
        heads.load_state_dict(run.saved["heads"])
        optimiser.restore(run.saved["optimiser"])

    def loss(rng: np.random.Generator) -> dict[str, torch.Tensor]:
        patches, targets = vision_pretraining.batch(rng, heads, plan.vision_batch, "train")
        return {"loss": heads.loss(run.vision(patches, deepstack=False).merged, targets)}

    def extra() -> dict[str, object]:
        return {"heads": heads.state_dict(), "optimiser": optimiser.state()}

    def scores() -> dict[str, float]:
        return vision_pretraining.evaluate(run.vision, heads, plan.seed, plan.vision_check)

    run.loop("vision", first, plan.vision_steps, optimiser, loss, scores, extra)


def train_decoder(run: Run, stage: str) -> None:
    """Stage 2: "reading" single pictures under short prompts, "judge" pairs, "whole" captions.

    "whole" starts from what "judge" has learned: taught all at once, everything came more slowly.
    """
    plan, model = run.plan, run.model
    torch.manual_seed(plan.seed + 2)
    probes = judge_training.TruthProbes(model.config.get_text_config().hidden_size)
    whole = stage == "whole"
    maker = BatchMaker(run.tokenizer, contrasts=judge_training.CONTRASTS if whole else 0.0)
    losses = judge_training.JudgeLoss(model, run.vision, probes, maker, whole=whole)
    mix = judge_training.WHOLE_MIX if whole else judge_training.MIX
    named = [(n, p) for n, p in model.named_parameters() if n != "lm_head.weight"]
    optimiser = Optimiser(
        [*named, *probes.named_parameters()], muon_lr=0.02, adam_lr=1.5e-3, factors=SLOWER
    )
    first = 0
    if run.saved is not None and run.saved["stage"] != "vision":
        probes.load_state_dict(run.saved["probes"])
        optimiser.restore(run.saved["optimiser"])
        first = run.saved["step"] if run.saved["stage"] == stage else 0

    def loss(rng: np.random.Generator) -> dict[str, torch.Tensor]:
        if stage == "reading":
            batch, patches = maker.reading_batch(rng, plan.reading_rows)
        else:
            batch, patches = maker.batch(rng, plan.judge_rows, "train", mix)
        return losses.losses(batch, patches)

    def extra() -> dict[str, object]:
        return {"probes": probes.state_dict(), "optimiser": optimiser.state()}

    def scores() -> dict[str, float]:
        if stage == "reading":
            return judge_training.evaluate_reading(losses, plan.seed, plan.judge_check // 4)
        return judge_training.evaluate(losses, plan.seed, plan.judge_check)

    steps: int = getattr(plan, f"{stage}_steps")
    run.loop(stage, first, steps, optimiser, loss, scores, extra)
    run.saved = {"stage": stage, "step": steps, **extra()}


def work(rank: int, out: Path, plan: Plan, resume: bool, init_from: Path | None = None) -> None:
    """What every worker does.

    Args:
        rank: Number of the worker.
        out: The run's directory.
        plan: What to do.
        resume: Go on from the state in `out`, if there is one.
        init_from: A trained judge's checkpoint, of which only the last stage is run.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run = Run(out, plan, resume, rank)
    signal.signal(signal.SIGTERM, run.request_stop)
    signal.signal(signal.SIGINT, run.request_stop)
    if init_from is not None and run.saved is None:
        run.load(init_from)
        train_decoder(run, "whole")
        return
    if run.saved is None or run.saved["stage"] == "vision":
        train_vision(run)
        turn_pictures(run.model, plan.seed)
        run.saved = None
    done = STAGES.index(run.saved["stage"]) if run.saved is not None else 0
    for stage in STAGES[max(1, done) :]:
        train_decoder(run, stage)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    # What is not given is the plan's default, or what the run to be resumed has.
    absent = argparse.SUPPRESS
    for name in ("seed", "vision-steps", "reading-steps", "judge-steps", "whole-steps"):
        parser.add_argument(f"--{name}", type=int, default=absent)
    parser.add_argument("--whole-peak", type=float, default=absent)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--init-from", type=Path, help="checkpoint; only the last stage is run")
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Plan) if hasattr(args, f.name)}
    try:
        plan = Plan(**given)
        if args.resume:
            plan = Plan(**resumed_plan(args.out / "state.pt", given, set(given) - {"seed"}))
    except ValueError as error:
        parser.error(str(error))
    parts = (args.out, plan, args.resume, args.init_from)
    start_or_say(work, plan.workers, args.out / "meeting", *parts)


if __name__ == "__main__":
    main()
