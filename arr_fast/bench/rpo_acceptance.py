"""Does RPO improve the bundled generator? The whole table, with one command:

    python -m arr_fast.bench.rpo_acceptance --out RESULTS [--minutes 20] [--seeds 0,1,2]
    python -m arr_fast.bench.rpo_acceptance --out RESULTS --arms base    # nothing is trained

Success is the pixel parser's, on four images of each held-out prompt at fixed noise; the judge
rewards and the parser never does. Arms start from the LAST weights of the base generator and get
the same wall time: RPO as `arr-fast train --demo` does it, or by another `--recipe`; the paper's
preset with the same sampler; the recipe on a shuffled reward; and more supervised training. All are
evaluated from their last weights, averaged as a run averages them. Finished arms are kept as files,
so the command can be interrupted and given again; two may run at once, on other arms or seeds. A
result that was made with other settings is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arr_fast.engine.config import resolve_compile
from arr_fast.engine.model import directory_hash, resolve_path
from arr_fast.errors import ArrFastError
from arr_fast.evals.intervals import resample_weights
from arr_fast.integrations.rpo_reward import build_rewards
from arr_fast.rpo.building import build_evaluation_schedule, build_policy
from arr_fast.rpo.config import RunConfig, preset_config, read_config
from arr_fast.rpo.generation import generate_images
from arr_fast.rpo.judge_config import JudgeConfig
from arr_fast.rpo.judging import Judgement, JudgeRequest, SubmitJudge
from arr_fast.rpo.metrics import sample_grid
from arr_fast.rpo.policies.base import Policy
from arr_fast.rpo.policies.shapes import ShapesPolicy
from arr_fast.rpo.presets import demo_path
from arr_fast.rpo.prompts import Prompt, load_prompts
from arr_fast.rpo.trainer import Parts, Trainer
from arr_fast.shapes import generator_directory
from arr_fast.shapes.generator import ShapesGenerator
from arr_fast.shapes.parser import success
from arr_fast.shapes.train_generator import continue_supervised

SCHEMA = 1
RESAMPLES = 10_000
# Prompts on a picture.
SHOWN = 24
# Images per prompt whose success is counted.
SAMPLES = 4
ARMS = ("recommended", "paper", "shuffled", "supervised")
# Gain over the base and the lower end of its interval; lead over supervised; gain of the shuffled.
LEAST_GAIN, LEAST_LOW, LEAST_LEAD, MOST_SHUFFLED = 0.15, 0.08, 0.07, 0.03
BASE_RANGE = (0.35, 0.65)
LEAST_AGREEMENT = 0.90


@dataclass(frozen=True, slots=True)
class Setting:
    """What every arm shares.

    Attributes:
        out: Where results go.
        base: Directory of the base generator.
        recipe: What the arms by RPO do.
        minutes: Wall time of an arm.
        prompts: Held-out ones.
        steps: Of the evaluation's Euler sampler.
    """

    out: Path
    base: Path
    recipe: RunConfig
    minutes: float
    prompts: Sequence[Prompt]
    steps: int

    @property
    def facts(self) -> dict[str, Any]:
        """What a result depends on, beside arm and seed."""
        recipe = hashlib.sha256(self.recipe.to_yaml().encode()).hexdigest()[:16]
        evaluated = {"steps": self.steps, "prompts": len(self.prompts), "samples": SAMPLES}
        return {
            "base": str(self.base),
            "base_weights": weights_hash(self.base),
            "recipe": recipe,
            "judge": judge_revision(self.recipe.judges["rubric"]),
            **evaluated,
        }

    def base_policy(self) -> Policy:
        """The generator that every arm starts from, as the recipe loads it."""
        return build_policy(self.recipe.changed(policy={"model": str(self.base)}), "cpu")

    def images(self, policy: Policy, candidates: int = 1) -> list[Image.Image]:
        """Images of the held-out prompts at fixed noise, candidates fastest."""
        recipe = self.recipe.changed(evaluation={"kind": "ode", "steps": self.steps})
        schedule = build_evaluation_schedule(recipe, policy)
        texts = [prompt.text for prompt in self.prompts]
        ids = [prompt.id for prompt in self.prompts]
        return generate_images(
            policy,
            texts,
            None,
            ids,
            schedule,
            seed=recipe.evaluation.seed,
            candidates=candidates,
            batch=50,
        )

    def successes(self, images: Sequence[Image.Image], per_prompt: int = 1) -> np.ndarray:
        """float64 [P, per_prompt] of 1 and 0."""
        texts = [prompt.text for prompt in self.prompts for _ in range(per_prompt)]
        return np.array(success(texts, images)).reshape(-1, per_prompt)


def weights_hash(directory: Path) -> str:
    """sha256 (first 16 hex digits) over the names and contents of a directory's weights."""
    digest = hashlib.sha256()
    for file in sorted(directory.rglob("*.safetensors")):
        digest.update(str(file.relative_to(directory)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def judge_revision(section: JudgeConfig) -> str:
    """What tells a judge from others of its name: a hash of its files, or who answers for it."""
    if section.call is not None:
        return section.call
    if section.url is not None:
        import httpx

        answer = httpx.get(f"{section.url}/ready", timeout=section.timeout_s, trust_env=False)
        return str(answer.json()["revision"])
    path = Path(resolve_path(section.model))
    return directory_hash(path) if path.is_dir() else section.model


class ShuffledJudge:
    """A judge whose verdicts are dealt out among the prompts of a chunk."""

    def __init__(self, judge: SubmitJudge, seed: int) -> None:
        self._judge, self._seed = judge, seed

    def __call__(self, request: JudgeRequest) -> Future[Judgement]:
        """Waits for the judge, then shuffles."""
        judged = self._judge(request).result()
        draws = torch.Generator().manual_seed(self._seed + sum(request.prompt_ids))
        assert judged.wins is not None
        order = torch.randperm(len(judged.wins), generator=draws)
        # A pair's two candidates change places at random as well, else a bias would survive.
        sign = torch.randint(0, 2, (len(order), 1, 1), generator=draws) * 2.0 - 1.0
        future: Future[Judgement] = Future()
        future.set_result(Judgement(wins=judged.wins[order] * sign, errors=judged.errors))
        return future


def agreement(
    setting: Setting, images: Sequence[Image.Image], found: np.ndarray, judge: SubmitJudge
) -> dict[str, Any]:
    """What the judge makes of a policy's own outputs.

    Args:
        setting: For its prompts.
        images: Two per prompt, candidates fastest.
        found: [P, 2], their success.
        judge: The reward.

    Returns:
        Over the pairs of which one image succeeds and one fails: their number, the share that the
        judge decides, and how often it then agrees with the parser. Over all pairs: the success of
        the judge's choice of two (a tie takes the first), and the mean pixel distance of the two.
    """
    pairs = list(zip(images[0::2], images[1::2], strict=True))
    wins = []
    for first in range(0, len(pairs), 50):
        part = list(setting.prompts[first : first + 50])
        request = JudgeRequest(
            prompt_ids=tuple(p.id for p in part),
            prompts=tuple(p.text for p in part),
            images=tuple(pairs[first : first + 50]),
            sources=None,
            metadata=tuple(p.metadata for p in part),
        )
        judged = judge(request).result().wins
        assert judged is not None
        wins.append(judged[:, 0, 1])
    sign: Tensor = torch.cat(wins)
    verdict = sign.nan_to_num(0.0).numpy()
    differ = found[:, 0] != found[:, 1]
    truth = found[:, 0] - found[:, 1]
    decided = differ & (verdict != 0)
    agreed = (verdict == truth)[decided]
    chosen = np.where(verdict < 0, found[:, 1], found[:, 0])
    pixels = [np.asarray(image, dtype=np.float32) / 255 for image in images]
    distance = [np.abs(a - b).mean() for a, b in zip(pixels[0::2], pixels[1::2], strict=True)]
    return {
        "agreement": float(agreed.mean()) if len(agreed) else None,
        "agreement_pairs": int(differ.sum()),
        "agreement_decided": float(decided.sum() / max(differ.sum(), 1)),
        "best_of_two": float(chosen.mean()),
        "diversity": float(np.mean(distance)),
    }


def arm_config(arm: str, setting: Setting, seed: int) -> RunConfig:
    """The configuration of an RPO arm."""
    recipe = setting.recipe
    if arm == "paper":
        shared = recipe.sampler.model_dump(include={"steps", "shift", "trained", "window"})
        recipe = preset_config("paper", sampler=shared)
    return recipe.changed(
        output=setting.out / f"{arm}-{seed}",
        seed=seed,
        iterations=100_000,
        max_minutes=setting.minutes,
        compile=resolve_compile("auto", torch.device("cpu")),
        trackers=[],
        evaluation={"every": None},
        checkpoint={"every": 10},
    )


def run_arm(arm: str, seed: int, setting: Setting, judge: SubmitJudge) -> dict[str, Any]:
    """Trains an arm, or goes on with it, and evaluates it."""
    began = time.monotonic()
    if arm == "supervised":
        generator = continue_supervised(setting.base, seconds=60 * setting.minutes, seed=seed)
        policy = ShapesPolicy(generator, ShapesGenerator.load(setting.base)[1])
        result = _evaluated(setting, policy, judge, setting.out / f"{arm}-{seed}.png")
    else:
        trainer = _train(arm, seed, setting, judge)
        now = setting.successes(setting.images(trainer.policy, SAMPLES), SAMPLES)
        ema = trainer.updater.ema
        with nullcontext() if ema is None else ema.applied():
            grid = setting.out / f"{arm}-{seed}.png"
            result = _evaluated(setting, trainer.policy, judge, grid)
        result["updates"] = trainer.updater.version
        result["success_not_averaged"] = float(now.mean())
    return {"arm": arm, "seed": seed, "seconds": time.monotonic() - began, **result}


def _kept(
    path: Path, facts: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What a file holds, or what is computed and then kept there with its facts.

    Raises:
        ArrFastError: The file has other facts.
    """
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in facts.items() if found.get(name) != value]
        if other:
            raise ArrFastError(
                f"{path} was made with another {' and '.join(other)}: give another --out, or "
                "remove it"
            )
        return found
    result = {**facts, **compute()}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def _evaluated_base(setting: Setting, judge: SubmitJudge) -> dict[str, Any]:
    return _evaluated(setting, setting.base_policy(), judge, setting.out / "base.png")


def _evaluated(setting: Setting, policy: Policy, judge: SubmitJudge, grid: Path) -> dict[str, Any]:
    images = setting.images(policy, SAMPLES)
    found = setting.successes(images, SAMPLES)
    _grid(setting, images[::SAMPLES], grid)
    pairs = [image for n, image in enumerate(images) if n % SAMPLES < 2]
    return {
        "success": found.mean(1).tolist(),
        **agreement(setting, pairs, found[:, :2], judge),
    }


def _train(arm: str, seed: int, setting: Setting, judge: SubmitJudge) -> Trainer:
    from arr_fast.rpo.checkpoint import latest_checkpoint, list_checkpoints

    config = arm_config(arm, setting, seed)
    section = setting.recipe.prompts
    prompts = load_prompts(section.source, count=section.count, seed=seed)
    rewards = {"rubric": ShuffledJudge(judge, seed) if arm == "shuffled" else judge}
    trainer = Trainer(config, Parts(setting.base_policy(), rewards, prompts, rubric_hash=arm))
    if list_checkpoints(config.output):
        trainer.resume(latest_checkpoint(config.output))
    outcome = trainer.train()
    if outcome.interrupted and trainer.was_asked_to_stop:
        raise SystemExit(f"{arm} {seed} was interrupted; the same command goes on with it")
    return trainer


def _grid(setting: Setting, images: Sequence[Image.Image], path: Path) -> None:
    """The base's images of the first prompts beside these, four columns of six prompts."""
    shown = replace(setting, prompts=setting.prompts[:SHOWN])
    before = shown.images(setting.base_policy())
    rows = list(zip(before, images[: len(before)], strict=True))
    found = shown.successes([image for row in rows for image in row], 2)
    marks = [["right" if ok else "wrong" for ok in row] for row in found]
    texts = [prompt.text for prompt in shown.prompts]
    columns = [
        sample_grid(rows[first : first + 6], texts[first : first + 6], marks[first : first + 6])
        for first in range(0, len(rows), 6)
    ]
    width, height = columns[0].width, max(column.height for column in columns)
    sheet = Image.new("RGB", (width * len(columns), height), "white")
    for number, column in enumerate(columns):
        sheet.paste(column, (width * number, 0))
    sheet.save(path)


def paired(after: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Gain with its 95 % interval, prompts resampled.

    Args:
        after, before: float64 [P], of the same prompts (means over seeds are fine).
    """
    difference = after - before
    weights = resample_weights(np.arange(len(difference)), RESAMPLES, 0).astype(np.float64)
    means = weights @ difference / weights.sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"gain": float(difference.mean()), "low": float(low), "high": float(high)}


def summarise(base: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table and its gates."""
    before = np.array(base["success"])
    rows: dict[str, Any] = {}
    for arm in dict.fromkeys(result["arm"] for result in results):
        own = [result for result in results if result["arm"] == arm]
        mean = np.mean([result["success"] for result in own], axis=0)
        rows[arm] = {
            "seeds": len(own),
            "success": [float(np.mean(result["success"])) for result in own],
            "mean": float(mean.mean()),
            **paired(mean, before),
            "agreement": [result["agreement"] for result in own],
            "agreement_decided": [result["agreement_decided"] for result in own],
            "best_of_two": [result["best_of_two"] for result in own],
            "diversity": [result["diversity"] for result in own],
            "updates": [result.get("updates") for result in own],
            "success_not_averaged": [result.get("success_not_averaged") for result in own],
            "minutes": [result["minutes"] for result in own],
        }
    gates = {
        "base in range": BASE_RANGE[0] <= float(before.mean()) <= BASE_RANGE[1],
        "judge agrees with the parser": (base["agreement"] or 0.0) >= LEAST_AGREEMENT,
    }
    if "recommended" in rows:
        best = rows["recommended"]
        gates["gain"] = best["gain"] >= LEAST_GAIN and best["low"] > LEAST_LOW
        if "supervised" in rows:
            gates["lead over supervised"] = best["gain"] - rows["supervised"]["gain"] >= LEAST_LEAD
    if "shuffled" in rows:
        gates["shuffled reward"] = rows["shuffled"]["gain"] < MOST_SHUFFLED
    return {
        "schema": f"arr_fast.rpo_acceptance/{SCHEMA}",
        "base": {key: value for key, value in base.items() if key != "success"}
        | {"mean": float(before.mean())},
        "arms": rows,
        "gates": gates,
    }


def markdown(summary: dict[str, Any]) -> str:
    """The table for a note."""
    base = summary["base"]
    lines = [
        "| arm | minutes | updates | success (each seed) | gain over base, 95 % | not averaged | "
        "judge-parser (decided) | best of 2 | diversity |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| base | | | {base['mean']:.1%} | | | {_percent(base['agreement'])} "
        f"({base['agreement_decided']:.0%}) | "
        f"{base['best_of_two']:.1%} | {base['diversity']:.3f} |",
    ]
    for arm, row in summary["arms"].items():
        lines.append(
            f"| {arm} | {_all(row['minutes'], '.0f')} | {_all(row['updates'], 'd')} | "
            f"{row['mean']:.1%} ({_all(row['success'], '.1%')}) | "
            f"{row['gain']:+.1%} [{row['low']:+.1%}, {row['high']:+.1%}] | "
            f"{_all(row['success_not_averaged'], '.1%')} | "
            f"{_all(row['agreement'], '.1%')} ({np.mean(row['agreement_decided']):.0%}) | "
            f"{np.mean(row['best_of_two']):.1%} | {np.mean(row['diversity']):.3f} |"
        )
    lines += [f"- {name}: {'met' if met else 'NOT met'}" for name, met in summary["gates"].items()]
    return "\n".join(lines) + "\n"


def _all(values: Sequence[float | None], form: str) -> str:
    shown = ["-" if value is None else format(value, form) for value in values]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def run(
    setting: Setting,
    arms: Sequence[str],
    seeds: Sequence[int],
    judge: SubmitJudge,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Everything; writes summary.json, summary.md and grids."""
    setting.out.mkdir(parents=True, exist_ok=True)
    facts = setting.facts
    base = _kept(setting.out / "base.json", facts, partial(_evaluated_base, setting, judge))
    success_of_base = float(np.mean(base["success"]))
    say(f"base: success {success_of_base:.1%}, judge-parser {_percent(base['agreement'])}")
    results = []
    for seed in seeds:
        for arm in arms:
            path = setting.out / f"{arm}-{seed}.json"
            compute = partial(run_arm, arm, seed, setting, judge)
            results.append(_kept(path, {**facts, "minutes": setting.minutes}, compute))
            say(f"{arm} seed {seed}: success {np.mean(results[-1]['success']):.1%}")
    summary = summarise(base, results)
    (setting.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (setting.out / "summary.md").write_text(markdown(summary), encoding="utf-8")
    return summary


def main() -> None:
    """Command line; exit 1 where a gate is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="default: the bundled generator")
    parser.add_argument("--recipe", type=Path, default=demo_path(), help="default: the demo's")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS), help="base: none, the base alone")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument(
        "--steps", type=int, help="Euler steps of the evaluation; default: the recipe's"
    )
    args = parser.parse_args()
    recipe = read_config(args.recipe)
    if recipe.policy.kind != "shapes" or list(recipe.judges) != ["rubric"]:
        parser.error(f"{args.recipe}: expected a policy of kind shapes and one judge, `rubric`")
    setting = Setting(
        out=args.out,
        base=args.base or generator_directory("shapes"),
        recipe=recipe,
        minutes=args.minutes,
        prompts=load_prompts("builtin:shapes-held-out", count=args.prompts),
        steps=args.steps or recipe.evaluation.steps,
    )
    judges, _, _ = build_rewards(recipe.judges, [])
    seeds = [int(seed) for seed in args.seeds.split(",")]
    arms = [arm for arm in args.arms.split(",") if arm != "base"]
    summary = run(setting, arms, seeds, judges["rubric"])
    print(markdown(summary))
    raise SystemExit(0 if all(summary["gates"].values()) else 1)


if __name__ == "__main__":
    main()
