"""`arr-fast train` and `arr-fast sample`."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arr_fast import __version__
from arr_fast.cli import options as opt
from arr_fast.cli.options import console, err_console

if TYPE_CHECKING:
    from arr_fast.rpo.config import RunConfig
    from arr_fast.rpo.policies.base import Policy
    from arr_fast.rpo.trainer import Outcome, Parts

SCHEMA = 1
INTERRUPTED = 130


def train(
    config: Annotated[Path | None, typer.Argument(help="YAML; see arr_fast/rpo/configs.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Go on from this checkpoint instead.")
    ] = None,
    demo: Annotated[bool, typer.Option(help="The bundled generator and judge, no config.")] = False,
    edit: Annotated[bool, typer.Option(help="With --demo: image editing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Overrides the configuration's.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Overrides it, too.")] = None,
    json_path: opt.JsonPath = None,
) -> None:
    """Train a generator by RPO; Ctrl-C or SIGTERM writes a checkpoint, --resume goes on from it."""
    with opt.one_line_errors():
        settings = _settings(config, demo, edit, output, iterations)
        outcome = _run(settings, resume, checkpoint)
        if json_path is not None:
            json_path.write_text(json.dumps(_outcome_json(outcome), indent=1) + "\n")
        console.print(
            f"{outcome.iterations} iterations, {outcome.updates} updates, "
            f"{sum(outcome.skipped.values())} skipped; in {settings.output}"
        )
        if outcome.interrupted:
            err_console.print("interrupted: a checkpoint was written; go on with --resume")
            raise typer.Exit(INTERRUPTED)


def sample(
    run: Annotated[Path, typer.Argument(help="A run's directory, or a YAML configuration.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="May be given several times.")],
    source: Annotated[
        list[Path] | None, typer.Option("--source", help="Image to edit, one per prompt.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the images.")] = Path("samples"),
    checkpoint: Annotated[Path | None, typer.Option(help="Default: the newest.")] = None,
    base: Annotated[bool, typer.Option(help="The policy before training.")] = False,
    ema: Annotated[bool, typer.Option(help="The averaged weights.")] = False,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(min=2, help="Default: the evaluation's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """Draw images with a trained policy."""
    with opt.one_line_errors():
        from PIL import Image

        from arr_fast.rpo.building import build_evaluation_schedule, build_policy
        from arr_fast.rpo.config import read_config
        from arr_fast.rpo.generation import generate_images

        opt.quiet_libraries()
        if base and (ema or checkpoint is not None):
            raise ValueError("--base draws with the untrained policy: leave --ema and --checkpoint")
        if ema and not run.is_dir() and checkpoint is None:
            raise ValueError(f"--ema needs a run or a checkpoint; {run} is a configuration")
        settings = read_config(run / "config.yaml" if run.is_dir() else run)
        # One process draws, whatever trained.
        settings = settings.changed(shard=False)
        if steps is not None:
            settings = settings.changed(evaluation={"steps": steps})
        policy = build_policy(settings, _device())
        if not base and (run.is_dir() or checkpoint is not None):
            _load_weights(policy, run, checkpoint, ema)
        images = None
        if source:
            images = [Image.open(path).convert("RGB") for path in source]
        schedule = build_evaluation_schedule(settings, policy)
        found = generate_images(
            policy, prompt, images, range(len(prompt)), schedule, seed=seed, candidates=count
        )
        out.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(found):
            path = out / f"{number // count:03d}-{number % count}.png"
            image.save(path)
            console.print(f"{path}  {prompt[number // count]}", markup=False, highlight=False)


def _settings(
    config: Path | None, demo: bool, edit: bool, output: Path | None, iterations: int | None
) -> RunConfig:
    from arr_fast.rpo.config import read_config
    from arr_fast.rpo.presets import demo_path

    if demo == (config is not None):
        raise ValueError("give a configuration file, or --demo")
    if edit and not demo:
        raise ValueError("--edit goes with --demo; a configuration says itself what it trains")
    if config is None:
        config = demo_path(edit=edit)
    changes: dict[str, Any] = {}
    if output is not None:
        changes["output"] = output
    if iterations is not None:
        changes["iterations"] = iterations
    return read_config(config).changed(**changes)


def _device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _run(settings: RunConfig, resume: bool, checkpoint: Path | None) -> Outcome:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from arr_fast.rpo.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
    from arr_fast.rpo.trainer import Trainer

    opt.quiet_libraries()
    _log_to_stderr()
    found = None
    if checkpoint is not None:
        found = load_checkpoint(checkpoint)
    elif resume:
        found = latest_checkpoint(settings.output)
    elif list_checkpoints(settings.output):
        raise ValueError(
            f"{settings.output} holds a run with checkpoints: use --resume, or another output"
        )
    with err_console.status("loading policy and judges"):
        trainer = Trainer(settings, build_parts(settings))
        if found is not None:
            _warn_of_changes(settings, found.path / "config.yaml")
            trainer.resume(found)
    columns = (
        TextColumn("iteration"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    show = trainer.ranks.own == 0
    with Progress(*columns, console=err_console, disable=not show) as bar:
        task = bar.add_task("", total=settings.iterations, completed=trainer.iteration)

        def progress(done: int, numbers: dict[str, float]) -> None:
            bar.update(task, completed=done, description=_line(numbers))

        outcome = trainer.train(progress=progress)
    # Its threads must not outlive the interpreter, which would abort.
    trainer.accelerator.state.destroy_process_group()
    return outcome


def _warn_of_changes(settings: RunConfig, saved: Path) -> None:
    """Names what the configuration says differently from the one that the checkpoint was made with;
    a longer run or another place is no difference."""
    from arr_fast.rpo.config import read_config
    from arr_fast.rpo.metrics import flat_config

    before, now = (
        flat_config(each.model_dump(mode="json", exclude={"output", "iterations", "max_minutes"}))
        for each in (read_config(saved), settings)
    )
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        logging.getLogger("arr_fast").warning(
            "changed since the checkpoint: %s",
            ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in changed),
        )


def build_parts(settings: RunConfig) -> Parts:
    """Loads everything that a run's configuration names."""
    from arr_fast.integrations.rpo_reward import build_rewards, check_engines
    from arr_fast.rpo.building import build_policy
    from arr_fast.rpo.evaluation import load_callable
    from arr_fast.rpo.prompts import load_prompts
    from arr_fast.rpo.trainer import Parts

    section, held = settings.prompts, settings.evaluation
    check_engines(settings.judges)
    prompts = load_prompts(section.source, count=section.count, seed=section.seed)
    held_out = []
    if held.every is not None:
        held_out = load_prompts(held.source, count=held.count)
    policy = build_policy(settings, _device())
    judges, sleepers, digest = build_rewards(settings.judges, prompts, device=_device())
    return Parts(
        policy=policy,
        judges=judges,
        prompts=prompts,
        held_out=held_out,
        evaluator=None if held.evaluator is None else load_callable(held.evaluator),
        sleepers=sleepers,
        rubric_hash=digest,
    )


def _load_weights(policy: Policy, run: Path, checkpoint: Path | None, ema: bool) -> None:
    import torch

    from arr_fast.rpo.checkpoint import latest_checkpoint, load_checkpoint

    found = latest_checkpoint(run) if checkpoint is None else load_checkpoint(checkpoint)
    policy.load(found.policy)
    if not ema:
        return
    state = found.state["updater"]["ema"]
    if state is None:
        raise ValueError(f"{found.path} holds no averaged weights")
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            parameter.copy_(state["means"][name])


def _line(numbers: dict[str, float]) -> str:
    """The few numbers that a progress bar has room for."""
    shown = {
        "decided": "pairs/decided",
        "kl": "kl_nats",
        "grad": "grad_norm",
        "hidden": "hidden_share",
        "held out": "held_out/evaluator",
    }
    return "  ".join(f"{k} {numbers[v]:.3g}" for k, v in shown.items() if v in numbers)


def _log_to_stderr() -> None:
    from rich.logging import RichHandler

    log = logging.getLogger("arr_fast")
    if not log.handlers:
        log.addHandler(RichHandler(console=err_console, show_path=False))
        log.setLevel(logging.INFO)


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "schema": f"arr_fast.train/{SCHEMA}",
        "arr_fast_version": __version__,
        "iterations": outcome.iterations,
        "updates": outcome.updates,
        "skipped": outcome.skipped,
        "interrupted": outcome.interrupted,
        "last": outcome.last,
    }
