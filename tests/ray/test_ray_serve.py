"""`arr-fast serve --ray` with two replicas on the CPU, as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from arr_fast.errors import ArrFastError
from arr_fast.judge import Judge
from arr_fast.serve.client import JudgeClient, JudgeServerError, RetryPolicy
from arr_fast.serve.ray_serve import RayScale, start
from arr_fast.serve.settings import ServeSettings
from tests.engine import scenes
from tests.ray.environment import BUSY_MACHINE
from tests.serve.running import MODEL, assert_close, pair

ROOT = Path(__file__).parents[2]
PATIENT = RetryPolicy(retries=30, backoff_s=0.2, max_pause_s=2.0, total_s=90.0)


class Cluster:
    """The command, its address, and the processes of its replicas."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def replicas(self) -> list[psutil.Process]:
        """Processes of the replicas, told by the title that Ray gives them."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if "ServeReplica" in title and "judge" in title:
                found.append(child)
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    pytest.importorskip("ray")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("ray") / "log"
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "arr_fast", "serve", "--ray", "--model", MODEL]
    command += ["--device", "cpu", "--replicas", "2", "--gpus-per-replica", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=ROOT,
            env={**os.environ, **BUSY_MACHINE, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    found = Cluster(process, f"http://127.0.0.1:{port}")
    try:
        wait_for(lambda: is_serving(found) or process.poll() is not None, 480.0, log)
        assert process.poll() is None, log.read_text()
        yield found
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90.0) == 0, log.read_text()
        _, alive = psutil.wait_procs(children, timeout=30.0)
        assert not alive, alive
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if is_up(process) else []:
            child.kill()
        process.kill()


def is_up(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def is_serving(cluster: Cluster) -> bool:
    try:
        JudgeClient(cluster.url).close()
    except JudgeServerError:
        return False
    return len(cluster.replicas()) == 2


def wait_for(condition, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def expected() -> list[dict]:
    """What an in-process judge says about the pairs that the clients send."""
    judge = Judge.from_pretrained(MODEL, device="cpu")
    answers = []
    for seed in range(6):
        a, b = pair(seed)
        found = judge.compare([f"scene {seed}"], [a], [b], scenes.rubric(1 + seed % 3))
        answers.append(json.loads(json.dumps(found.to_json())))
    return answers


def ask(cluster: Cluster, seed: int) -> dict:
    a, b = pair(seed)
    with JudgeClient(cluster.url, timeout_s=60.0, policy=PATIENT, check=False) as client:
        return client.compare([f"scene {seed}"], [a], [b], scenes.rubric(1 + seed % 3))


@pytest.mark.ray
def test_two_replicas_answer_as_the_judge_does(cluster, expected):
    with ThreadPoolExecutor(6) as pool:
        for found, wanted in zip(
            pool.map(lambda n: ask(cluster, n), range(6)), expected, strict=True
        ):
            assert_close(found, wanted)


@pytest.mark.ray
def test_a_replica_killed_under_load_loses_no_request(cluster, expected):
    victim, other = cluster.replicas()
    with ThreadPoolExecutor(8) as pool:
        sent = [(n % 6, pool.submit(ask, cluster, n % 6)) for n in range(48)]
        while sum(future.done() for _, future in sent) < 8:
            time.sleep(0.02)
        os.kill(victim.pid, signal.SIGKILL)
        seen: Counter[int] = Counter()
        for seed, future in sent:
            # Each request has one answer, and the right one.
            assert_close(future.result(120.0), expected[seed])
            seen[seed] += 1
    assert seen == Counter({seed: 8 for seed in range(6)})
    assert not psutil.pid_exists(victim.pid) or victim.status() == psutil.STATUS_ZOMBIE
    assert other.is_running()
    # Ray starts another in its place.
    deadline = time.monotonic() + 120.0
    while {replica.pid for replica in cluster.replicas()} in ({other.pid}, {other.pid, victim.pid}):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_scaling_options_reach_ray():
    settings = ServeSettings(max_queued_requests=7, drain_timeout_s=3.0)
    fixed = RayScale(replicas=3, gpus=0.5, cpus=2).options(settings)
    assert fixed["num_replicas"] == 3 and "autoscaling_config" not in fixed
    assert fixed["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 0.5}
    assert fixed["max_ongoing_requests"] == 7 and fixed["graceful_shutdown_timeout_s"] == 3.0
    scaled = RayScale(replicas=1, max_replicas=4, ongoing_per_replica=9).options(settings)
    assert "num_replicas" not in scaled
    assert scaled["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 9.0,
    }
    with pytest.raises(ValidationError, match="is under replicas"):
        RayScale(replicas=2, max_replicas=1)


def test_pickle_is_not_served_behind_a_proxy():
    pytest.importorskip("ray")
    with pytest.raises(ArrFastError, match="pickle"):
        start({"model": MODEL}, ServeSettings(pickle=True), RayScale())
