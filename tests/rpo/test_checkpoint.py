"""Checkpoints: exact resume, a full disk, damage; and data parallelism against one process."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from arr_fast.errors import CheckpointError, TrainingError
from arr_fast.rpo import checkpoint as module
from arr_fast.rpo.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from arr_fast.rpo.policies.diffusers_policy import LoraOptions
from arr_fast.rpo.policies.shapes import ShapesPolicy
from arr_fast.rpo.trainer import Trainer
from tests.rpo.small_generator import save_small
from tests.rpo.toy import bright_judge, toy_config, toy_parts
from tests.rpo.toy_run import gradients

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.rpo.toy_run", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def everything(trainer):
    """All that an iteration depends on, as tensors and plain values."""
    state = trainer.updater.state()
    moments = state["optimiser"]["state"]
    return {
        **{f"weight {k}": v.detach().clone() for k, v in trainer.updater.parameters.items()},
        **{f"mean {k}": v.clone() for k, v in state["ema"]["means"].items()},
        **{f"moment {k} {n}": v.clone() for k, m in moments.items() for n, v in m.items()},
        "walk": trainer.walk.state(),
        "version": trainer.updater.version,
        "iteration": trainer.iteration,
    }


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        equal = torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key]
        assert equal, key


def trained(config, parts=None, resume=None):
    trainer = Trainer(config, parts or toy_parts())
    if resume is not None:
        trainer.resume(latest_checkpoint(resume))
    trainer.train()
    return trainer


def test_killed_and_resumed_equals_straight_to_the_bit(tmp_path):
    settings = {"iterations": 6, "evaluation": {"every": None}}
    straight = trained(toy_config(tmp_path / "straight", **settings))
    process = start("killed", tmp_path / "killed", 6, 4)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    # Iteration 3 was done and lost with iteration 4; it is replayed.
    assert latest_checkpoint(tmp_path / "killed").iteration == 2
    resumed = trained(toy_config(tmp_path / "killed", **settings), resume=tmp_path / "killed")
    same(everything(straight), everything(resumed))
    lines = [
        (tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("straight", "killed")
    ]
    assert len(lines[0]) == len(lines[1]) == 6


def test_the_ratio_is_one_after_resume(tmp_path):
    trained(toy_config(tmp_path, iterations=2))
    trainer = Trainer(toy_config(tmp_path, iterations=3), toy_parts())
    trainer.resume(latest_checkpoint(tmp_path))
    numbers = trainer.run_iteration()
    assert abs(numbers["ratio_max"] - 1) < 1e-6
    assert abs(numbers["ratio_min"] - 1) < 1e-6


def free_port():
    """Below the ephemeral ports: a rank that waits for an ephemeral one may connect to itself."""
    for port in random.sample(range(15_000, 30_000), 100):
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")


def together(*arguments):
    """Runs two ranks to their end."""
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [start(*arguments, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(2)]
    for process in ranks:
        finish(process)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def test_two_processes_have_the_gradients_of_one(tmp_path):
    together("gradients", tmp_path / "two")
    gradients(tmp_path / "one")
    one = torch.load(tmp_path / "one" / "gradients-0.pt")
    two = [torch.load(tmp_path / "two" / f"gradients-{rank}.pt") for rank in range(2)]
    flat = [torch.cat([g.flatten() for g in each.values()]) for each in (one, *two)]
    assert torch.equal(flat[1], flat[2])
    assert (flat[0] - flat[1]).norm() <= 1e-6 * flat[0].norm()


def test_sigterm_writes_a_checkpoint_and_ends_cleanly(tmp_path):
    def judge(request):
        if threading.current_thread() is threading.main_thread():
            os.kill(os.getpid(), signal.SIGTERM)
        return bright_judge(request)

    config = toy_config(tmp_path, checkpoint={"every": 100}, evaluation={"every": None})
    outcome = Trainer(config, toy_parts(judge)).train()
    assert (outcome.interrupted, outcome.iterations) == (True, 1)
    assert latest_checkpoint(tmp_path).iteration == 1


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    trainer = trained(toy_config(tmp_path, iterations=2))
    before = latest_checkpoint(tmp_path).path

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    trainer.iteration = 3
    with pytest.raises(CheckpointError, match=r"No space left.*last usable.*iteration-000002"):
        trainer.save()
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [before]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert load_checkpoint(before).iteration == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_with_the_previous_one(tmp_path, damage):
    trained(toy_config(tmp_path, iterations=4, evaluation={"every": None}))
    last = list_checkpoints(tmp_path)[-1]
    victim = last / ("manifest.json" if damage == "manifest" else "state.pt")
    data = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        CheckpointError, match=r"iteration-000004.*usable.*iteration-000002"
    ) as found:
        latest_checkpoint(tmp_path)
    assert victim.name in str(found.value)
    assert load_checkpoint(list_checkpoints(tmp_path)[0]).iteration == 2


def test_another_rubric_is_another_run(tmp_path):
    trained(toy_config(tmp_path, iterations=2, evaluation={"every": None}))
    trainer = Trainer(toy_config(tmp_path), toy_parts(rubric_hash="other"))
    with pytest.raises(TrainingError, match="a changed reward is another run"):
        trainer.resume(latest_checkpoint(tmp_path))


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        latest_checkpoint(tmp_path)


def test_old_checkpoints_are_deleted(tmp_path):
    config = toy_config(
        tmp_path, iterations=6, checkpoint={"every": 1, "keep": 3}, evaluation={"every": None}
    )
    trained(config)
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        f"iteration-00000{n}" for n in (4, 5, 6)
    ]


@pytest.mark.parametrize(
    ("trained", "how"),
    [
        ("lora", ""),
        ("full", ""),
        pytest.param("lora", "-compiled", marks=pytest.mark.compile),
    ],
)
def test_a_split_network_trains_and_resumes_as_a_whole_one(tmp_path, trained, how):
    """FSDP2 over two processes: the weights and their averages after two updates are those of one
    process; what its checkpoint holds goes on to the bit, and loads into a policy of one."""
    base = save_small(tmp_path / "base")
    kind = trained + how
    together("shapes", tmp_path, base, kind)
    finish(start("shapes", tmp_path, base, f"{trained}-whole"))
    alone = torch.load(tmp_path / f"{trained}-whole-0.pt")
    split, other = (torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in range(2))
    resumed = torch.load(tmp_path / f"{kind}-resumed-0.pt")
    begun = ShapesPolicy.from_pretrained(base).transformer.state_dict()
    for part, values in alone.items():
        for name, value in values.items():
            assert torch.equal(split[part][name], other[part][name]), name
            assert torch.equal(split[part][name], resumed[part][name]), name
            torch.testing.assert_close(split[part][name], value, rtol=0, atol=2e-6)
            # A LoRA's second factor starts from zero, the first one is drawn.
            old = begun[name] if trained == "full" else torch.zeros_like(value)
            assert not torch.equal(value, old), name
    lora = LoraOptions(rank=2) if trained == "lora" else None
    policy = ShapesPolicy.from_pretrained(base, lora=lora)
    policy.load(latest_checkpoint(tmp_path / kind).policy)
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(parameter, split["trained"][name]), name


def test_what_the_configuration_says_of_the_optimizer_holds_after_resume(tmp_path):
    quiet = {"evaluation": {"every": None}, "checkpoint": {"every": 2}}
    trained(toy_config(tmp_path, iterations=2, **quiet))
    now = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "warmup": 0}
    config = toy_config(tmp_path, iterations=3, micro_batch=4, optimiser=now, **quiet)
    trainer = Trainer(config, toy_parts())
    trainer.resume(latest_checkpoint(tmp_path))
    moments = trainer.updater.optimiser.state_dict()["state"]
    assert all(state["step"] == 2 for state in moments.values())
    rates = []
    trainer.updater.optimiser.register_step_pre_hook(
        lambda optimizer, args, kwargs: rates.append(dict(optimizer.param_groups[0]))
    )
    numbers = trainer.run_iteration()
    (used,) = rates
    assert {key: used[key] for key in ("lr", "weight_decay", "betas", "eps")} == {
        key: now[key] for key in ("lr", "weight_decay", "betas", "eps")
    }
    assert numbers["lr"] == 3e-3
    assert trainer.updater.state()["rows"] == 4


def test_averages_that_a_checkpoint_lacks_start_from_its_weights(tmp_path):
    quiet = {"evaluation": {"every": None}, "checkpoint": {"every": 2}}
    trained(toy_config(tmp_path, iterations=2, ema=None, **quiet))
    trainer = Trainer(toy_config(tmp_path, iterations=3, **quiet), toy_parts())
    trainer.resume(latest_checkpoint(tmp_path))
    weights = {n: p.detach().clone() for n, p in trainer.updater.parameters.items()}
    assert any(bool(w.any()) for w in weights.values())
    with trainer.updater.ema.applied():
        assert all(torch.equal(p, weights[n]) for n, p in trainer.updater.parameters.items())


def test_an_older_checkpoint_taken_up_again_is_not_overtaken_by_the_later_ones(tmp_path, caplog):
    settings = {"checkpoint": {"every": 2, "keep": 2}, "evaluation": {"every": None}}
    trained(toy_config(tmp_path, iterations=6, **settings))
    older, newer = list_checkpoints(tmp_path)
    assert (older.name, newer.name) == ("iteration-000004", "iteration-000006")
    trainer = Trainer(toy_config(tmp_path, iterations=7, **settings), toy_parts())
    trainer.resume(load_checkpoint(older))
    trainer.run_iteration()
    trainer.save()
    assert latest_checkpoint(tmp_path).iteration == 5
    # Nothing is lost: the left course can still be taken up by its path.
    aside = newer.with_name("superseded-iteration-000006")
    assert load_checkpoint(aside).iteration == 6
    assert "superseded" in caplog.text


def test_a_stop_before_the_first_iteration_leaves_a_checkpoint(tmp_path):
    def stop(prompts, images, sources=None, metadata=None):
        os.kill(os.getpid(), signal.SIGTERM)
        return [0.0] * len(images)

    outcome = Trainer(toy_config(tmp_path), toy_parts(evaluator=stop)).train()
    assert (outcome.interrupted, outcome.iterations) == (True, 0)
    assert latest_checkpoint(tmp_path).iteration == 0


def test_a_line_that_a_crash_cut_short_does_not_stop_a_resume(tmp_path):
    settings = {"evaluation": {"every": None}}
    trained(toy_config(tmp_path, iterations=2, **settings))
    log = tmp_path / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"iteration": 3, "lo')
    trained(toy_config(tmp_path, iterations=2, **settings), resume=tmp_path)
    assert log.read_text() == whole
    log.write_text("broken\n" + whole)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl:1: not valid JSON"):
        trained(toy_config(tmp_path, iterations=2, **settings), resume=tmp_path)
