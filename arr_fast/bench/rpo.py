"""One RPO iteration, split into sampling, judging and training, against a loop of the reference's
shape.

Nothing is timed unless all contenders have the same gradient: identical prompts, noise, judge and
loss. A judge that sleeps stands in for a real one where its cost is to be set; `--judge builtin`
takes the bundled one. "ours-serial" waits for each chunk's judgement before it samples the next.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arr_fast.bench.allocations import peak_allocated
from arr_fast.bench.rows import environment
from arr_fast.bench.rpo_reference_loop import reference_iteration
from arr_fast.errors import ArrFastError
from arr_fast.rpo.advantages import advantages, mix_preferences
from arr_fast.rpo.judging import Judgement, JudgeRequest, SubmitJudge
from arr_fast.rpo.loss import Objective, clip_from_nats
from arr_fast.rpo.packing import PackedRows
from arr_fast.rpo.policies.shapes import ShapesPolicy
from arr_fast.rpo.rollout import JudgedChunk, PromptBatch, SamplingConfig
from arr_fast.rpo.sampler import Sampler, hidden_share
from arr_fast.rpo.schedule import shifted_sigmas
from arr_fast.rpo.sde import build_schedule
from arr_fast.rpo.step import TrainStep, graph_count
from arr_fast.shapes.generator import ShapesGenerator
from arr_fast.shapes.generator_data import sample_prompts
from arr_fast.shapes.latents import PatchCode
from arr_fast.shapes.train_generator import fit_code

SCHEMA = 2
# Relative L2 difference of gradients.
TOLERANCE = 1e-5
SEED = 0
STEPS = 8
TRAINED = (4, 7)
WORKLOADS: dict[str, dict[str, Any]] = {
    # Overhead-bound: a forward is mostly launches.
    "tiny": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
    # Compute-bound: the size of the bundled generator.
    "shapes": {},
}
ENGINES = ("ours", "ours-eager", "ours-serial", "reference-loop")


@dataclass(frozen=True, slots=True)
class RPORow:
    """One contender; seconds are medians over repeats of one iteration.

    Attributes:
        workload, engine: What ran.
        pairs, chunks, micro_batch, steps, trained: Its shape.
        judge: Name of the judge.
        gate_difference: Relative L2 difference of the gradient from the reference-shaped loop's.
        sampling, judging, waiting, training, total: Seconds.
        hidden_share: Of judging, behind sampling.
        ratio: Median over repeats of total / total of `ours` in the same repeat.
        training_peak_bytes: Most that the training phase holds above weights and rollout (its
            gradients count); None where it was not measured.
        recompiled: Graphs that dynamo built during the timed repeats.
        dtype, threads, device, torch, transformers, arr_fast, commit, time: Where and when.
    """

    workload: str
    engine: str
    pairs: int
    chunks: int
    micro_batch: int
    steps: int
    trained: int
    judge: str
    gate_difference: float
    sampling: float
    judging: float
    waiting: float
    training: float
    total: float
    hidden_share: float
    ratio: float
    training_peak_bytes: int | None
    recompiled: int
    dtype: str
    threads: int
    device: str
    torch: str
    transformers: str
    arr_fast: str
    commit: str
    time: str


COLUMNS = [field.name for field in fields(RPORow)]


class SleepingJudge:
    """Prefers the candidate with more red; every pair takes a fixed time.

    Args:
        seconds: Per pair.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sleeping-judge")

    def __call__(self, request: JudgeRequest) -> Future[Judgement]:
        """Judges in the background."""
        return self._thread.submit(self._judge, request)

    def _judge(self, request: JudgeRequest) -> Judgement:
        time.sleep(self._seconds * len(request.prompts))
        red = [[float(np.asarray(i)[..., 0].mean()) for i in pair] for pair in request.images]
        return Judgement.from_pairs([float(np.sign(a - b)) for a, b in red])


class Contest:
    """One policy, prompts and judge for all contenders.

    Args:
        workload: A key of WORKLOADS.
        pairs, chunks: Of an iteration.
        micro_batch: Rows of ours; the reference-shaped loop has one.
        judge: What judges.
    """

    def __init__(
        self, workload: str, pairs: int, chunks: int, micro_batch: int, judge: SubmitJudge
    ) -> None:
        if workload not in WORKLOADS:
            raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {workload!r}")
        if pairs % chunks:
            raise ValueError(f"pairs {pairs} is not a multiple of chunks {chunks}")
        generator = ShapesGenerator(seed=SEED, sizes=WORKLOADS[workload])
        code: PatchCode = fit_code(SEED)
        self.policy = ShapesPolicy(generator, code)
        self._move_from_reference()
        self.judge, self.micro_batch = judge, micro_batch
        self.schedule = build_schedule(shifted_sigmas(STEPS, 3.0), "sde", 0.7)
        elements = code.scale.numel() * self.policy.latent_shape[0]
        clip = clip_from_nats(6.5, elements)
        self.objective = Objective(clip, clip, beta=0.03, kl="latent_mean")
        prompts = list(sample_prompts(pairs, seed=SEED, split="train", task="t2i"))
        size = pairs // chunks
        self.batches = []
        for first in range(0, pairs, size):
            texts = tuple(p.text for p in prompts[first : first + size])
            rows = tuple({"rubric": p.rubric} for p in prompts[first : first + size])
            ids = tuple(range(first, first + size))
            encoded = self.policy.encode(texts)
            self.batches.append(PromptBatch(ids, texts, encoded, metadata=rows))

    def _move_from_reference(self) -> None:
        """Trained weights that differ from the reference's, so that the KL has a gradient."""
        draws = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in self.policy.trainable_parameters().values():
                noise = torch.randn(parameter.shape, generator=draws)
                parameter.add_(0.02 * noise)

    def contender(self, engine: str) -> Callable[[], Mapping[str, float]]:
        """A function that runs one iteration and returns its seconds."""
        if engine == "reference-loop":
            return lambda: reference_iteration(
                self.policy,
                self.batches,
                self.schedule,
                self.objective,
                self.judge,
                seed=SEED,
                trained=TRAINED,
            )
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        return self._ours(compile=engine != "ours-eager", serial=engine == "ours-serial")

    def _parts(self, *, compile: bool, serial: bool = False) -> tuple[Sampler, TrainStep]:
        config = SamplingConfig(train_steps=TRAINED[0], train_window=TRAINED[1], seed=SEED)
        judges = {"rubric": _answered(self.judge) if serial else self.judge}
        sampler = Sampler(self.policy, self.schedule, config, judges, compile=compile)
        return sampler, TrainStep(self.policy, self.objective, compile=compile)

    def _packed(self, chunks: Sequence[JudgedChunk]) -> PackedRows:
        given = [advantages(mix_preferences(chunk.judgements)) for chunk in chunks]
        return PackedRows([c.trajectories for c in chunks], given, self.micro_batch)

    def training_peak(self, engine: str) -> int | None:
        """Peak bytes of the training phase of "ours" and "ours-eager", gradients included."""
        if engine not in ("ours", "ours-eager"):
            return None
        sampler, step = self._parts(compile=engine == "ours")
        packed = self._packed(sampler.iterate(self.batches))

        def train() -> None:
            for parameter in self.policy.trainable_parameters().values():
                parameter.grad = None
            step.accumulate(packed)

        return peak_allocated(train)

    def _ours(self, *, compile: bool, serial: bool) -> Callable[[], Mapping[str, float]]:
        sampler, step = self._parts(compile=compile, serial=serial)

        def iterate() -> Mapping[str, float]:
            began = time.perf_counter()
            chunks = sampler.iterate(self.batches)
            judged = time.perf_counter()
            step.accumulate(self._packed(chunks))
            ended = time.perf_counter()
            sums = {
                name: sum(chunk.seconds.get(name, 0.0) for chunk in chunks)
                for name in ("sampling", "judging", "waiting")
            }
            return {
                **sums,
                "training": ended - judged,
                "total": ended - began,
                "hidden_share": hidden_share(chunks),
            }

        return iterate

    def gradient(self, run: Callable[[], Mapping[str, float]]) -> Tensor:
        """The flat gradient of one iteration; `.grad` is empty afterwards."""
        parameters = list(self.policy.trainable_parameters().values())
        for parameter in parameters:
            parameter.grad = None
        run()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        for parameter in parameters:
            parameter.grad = None
        return flat


def _answered(judge: SubmitJudge) -> SubmitJudge:
    """A judge that answers before it returns."""

    def ask(request: JudgeRequest) -> Future[Judgement]:
        future = judge(request)
        future.result()
        return future

    return ask


def run_rpo_bench(
    workloads: Sequence[str],
    engines: Sequence[str] = ENGINES,
    *,
    pairs: int = 16,
    chunks: int = 8,
    micro_batch: int = 16,
    repeats: int = 5,
    judge: SubmitJudge | None = None,
    judge_name: str = "sleeping",
    judge_seconds: float = 0.0,
    threads: int | None = None,
    csv_path: Path | None = None,
    json_path: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[RPORow]:
    """Gates and times.

    Args:
        workloads: Keys of WORKLOADS.
        engines: Of ENGINES; "ours" is always among them.
        pairs, chunks, micro_batch: Of an iteration.
        repeats: Interleaved, each contender once a repeat.
        judge: A real judge; None takes one that sleeps.
        judge_name: What rows call it.
        judge_seconds: Per pair, of the sleeping judge.
        threads: Of torch; None leaves it.
        csv_path: Rows are appended here.
        json_path: One versioned object.
        say: Where progress goes.

    Raises:
        ArrFastError: The gradients disagree, or the CSV file has other columns; nothing was timed
            then.
    """
    if csv_path is not None:
        _check_columns(csv_path)
    if threads is not None:
        torch.set_num_threads(threads)
    names = list(dict.fromkeys(["ours", *engines]))
    rows: list[RPORow] = []
    for workload in workloads:
        contest = Contest(
            workload, pairs, chunks, micro_batch, judge or SleepingJudge(judge_seconds)
        )
        runs = {name: contest.contender(name) for name in names}
        differences = _gate(contest, runs, say)
        seconds, recompiled = _time(contest, runs, repeats)
        for name in names:
            rows.append(
                RPORow(
                    workload=workload,
                    engine=name,
                    pairs=pairs,
                    chunks=chunks,
                    micro_batch=1 if name == "reference-loop" else micro_batch,
                    steps=STEPS,
                    trained=TRAINED[0],
                    judge=judge_name,
                    gate_difference=differences[name],
                    **_medians(seconds[name]),
                    ratio=median(
                        other["total"] / own["total"]
                        for own, other in zip(seconds["ours"], seconds[name], strict=True)
                    ),
                    training_peak_bytes=contest.training_peak(name),
                    recompiled=recompiled,
                    **environment(torch.get_num_threads()),
                )
            )
            say(_line(rows[-1]))
    if csv_path is not None:
        _append(rows, csv_path)
    if json_path is not None:
        document = {"schema": f"arr_fast.bench_rpo/{SCHEMA}", "rows": [asdict(r) for r in rows]}
        json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return rows


def _gate(
    contest: Contest, runs: Mapping[str, Callable[[], Mapping[str, float]]], say: Any
) -> dict[str, float]:
    """Relative differences from the reference-shaped loop's gradient; also warms everything up."""
    expected = contest.gradient(contest.contender("reference-loop"))
    if not bool(expected.abs().sum() > 0):
        raise ArrFastError("the gradient is zero: no pair was decided")
    found = {}
    for name, run in runs.items():
        gradient = contest.gradient(run)
        found[name] = float((gradient - expected).norm() / expected.norm())
        say(f"gate {name}: gradient differs by {found[name]:.2g} (relative L2)")
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}
    if wrong:
        raise ArrFastError(f"gradients differ by more than {TOLERANCE}: {wrong}; nothing was timed")
    return found


def _time(
    contest: Contest, runs: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int
) -> tuple[dict[str, list[Mapping[str, float]]], int]:
    seconds: dict[str, list[Mapping[str, float]]] = {name: [] for name in runs}
    before = graph_count()
    for _ in range(repeats):
        for name, run in runs.items():
            for parameter in contest.policy.trainable_parameters().values():
                parameter.grad = None
            seconds[name].append(run())
    return seconds, graph_count() - before


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    # In the reference's shape nothing is hidden: it waits for all of its judging.
    full = [{"waiting": run["judging"], "hidden_share": 0.0, **run} for run in runs]
    names = ("sampling", "judging", "waiting", "training", "total", "hidden_share")
    return {name: median(run[name] for run in full) for name in names}


def _line(row: RPORow) -> str:
    peak = row.training_peak_bytes
    return (
        f"{row.workload:7} {row.engine:15} total {row.total:.3f} s = sampling {row.sampling:.3f} + "
        f"waiting {row.waiting:.3f} (of judging {row.judging:.3f}) + training {row.training:.3f}; "
        f"{row.ratio:.2f}x ours" + ("" if peak is None else f"; training holds {peak / 1e6:.1f} MB")
    )


def _check_columns(path: Path) -> bool:
    """Whether a CSV file has its header already.

    Raises:
        ArrFastError: It has another one.
    """
    if not path.exists() or path.stat().st_size == 0:
        return False
    if path.read_text(encoding="utf-8").splitlines()[0] != ",".join(COLUMNS):
        raise ArrFastError(f"{path} has other columns than this version writes: give a new file")
    return True


def _append(rows: Sequence[RPORow], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    has_header = _check_columns(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not has_header:
            writer.writeheader()
        for row in rows:
            writer.writerow(asdict(row))
