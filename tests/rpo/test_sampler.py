"""Rollouts against float64 formulas, noise that follows its key, and judging beside sampling."""

from __future__ import annotations

import copy
import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from arr_fast.ops.philox import philox_normal
from arr_fast.rpo.judging import Judgement, JudgeRequest
from arr_fast.rpo.rollout import PromptBatch, SamplingConfig
from arr_fast.rpo.sampler import Sampler, hidden_share
from arr_fast.rpo.schedule import shifted_sigmas
from arr_fast.rpo.sde import Schedule, build_schedule, noise_seeds
from tests.rpo.toy_policy import ToyPolicy, prompt_batch

KINDS = {"dance_sde": 0.3, "sde": 0.7, "cps": 0.8}
STEPS = 5


def schedule_of(kind: str, steps: int = STEPS, **options: Any) -> Schedule:
    eta = KINDS.get(kind, 0.0)
    return build_schedule(shifted_sigmas(steps, 3.0), kind, eta, **options)  # type: ignore[arg-type]


def published_step(
    kind: str, sigmas: Tensor, step: int, x: Tensor, v: Tensor
) -> tuple[Tensor, float]:
    """Mean and standard deviation as flow_grpo and DanceGRPO write them, in float64."""
    sigma, following = float(sigmas[step]), float(sigmas[step + 1])
    dt, eta = following - sigma, KINDS.get(kind, 0.0)
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    if step == len(sigmas) - 2:
        return x0, 0.0
    if kind == "dance_sde":
        score = -(x - x0 * (1 - sigma)) / sigma**2
        return x + v * dt - 0.5 * eta**2 * score * dt, eta * math.sqrt(-dt)
    if kind == "sde":
        inner = float(sigmas[1]) if sigma == 1 else sigma
        rate = eta * math.sqrt(sigma / (1 - inner))
        mean = x * (1 + rate**2 / (2 * sigma) * dt)
        mean = mean + v * (1 + rate**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, rate * math.sqrt(-dt)
    if kind == "cps":
        std = following * math.sin(eta * math.pi / 2)
        return (1 - following) * x0 + math.sqrt(following**2 - std**2) * x1, std
    return x + v * dt, 0.0


@pytest.mark.parametrize("kind", [*KINDS, "ode"])
def test_every_step_is_the_published_one(kind: str) -> None:
    """sigma = 1 at the first step, S = 0 at the last; each step is checked from its own input."""
    policy = ToyPolicy()
    batch = prompt_batch(policy)
    config = SamplingConfig(candidates=3, seed=11)
    result = Sampler(policy, schedule_of(kind), config).sample(batch)
    network = copy.deepcopy(policy.module).double()
    sigmas = result.schedule.sigmas
    condition = batch.conditions["condition"].double().repeat_interleave(3, dim=0)
    for step in range(STEPS):
        x = result.latents[:, step].double()
        times = torch.full((9,), float(sigmas[step]), dtype=torch.float64)
        with torch.no_grad():
            v = network(x, times, condition)
        mean, std = published_step(kind, sigmas, step, x, v)
        noise = philox_normal(noise_seeds(11, 0, batch.ids, 3, step), 21).view(9, 3, 7)
        following = result.latents[:, step + 1].double()
        assert torch.allclose(following, mean + std * noise.double(), atol=3e-6)
        if std == 0:
            assert bool(result.log_probs[:, step].isnan().all())
            continue
        density = -((following - mean) ** 2) / (2 * std**2) - math.log(std)
        expected = (density - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)
        assert torch.allclose(result.log_probs[:, step].double(), expected, atol=1e-5)


def test_the_model_is_told_floored_times_where_asked() -> None:
    policy = ToyPolicy()
    told: list[float] = []
    original = policy.velocity

    def spy(latents: Tensor, sigma: Tensor, conditions: Any) -> Tensor:
        told.append(float(sigma[0]))
        return original(latents, sigma, conditions)

    policy.velocity = spy  # type: ignore[method-assign]
    schedule = schedule_of("sde", 8, floor_times=True)
    Sampler(policy, schedule, SamplingConfig()).sample(prompt_batch(policy, count=1))
    assert told == pytest.approx([1.0, 0.954, 0.9, 0.833, 0.75, 0.642, 0.5, 0.3])


def test_a_trajectory_does_not_depend_on_its_batch() -> None:
    policy = ToyPolicy()
    sampler = Sampler(policy, schedule_of("sde"), SamplingConfig(train_steps=2))
    together = sampler.sample(prompt_batch(policy, 0, 4))
    alone = sampler.sample(prompt_batch(policy, 2, 1))
    assert torch.equal(together.latents[4:6, 0], alone.latents[:, 0])
    assert torch.allclose(together.latents[4:6], alone.latents, atol=1e-5)
    assert torch.equal(together.trained[2], alone.trained[0])
    later = sampler.sample(prompt_batch(policy, 2, 1, epoch=1))
    assert not torch.allclose(later.latents[:, 0], alone.latents[:, 0])


def test_shared_initial_noise() -> None:
    policy = ToyPolicy()
    config = SamplingConfig(shared_initial_noise=True)
    result = Sampler(policy, schedule_of("sde"), config).sample(prompt_batch(policy))
    pairs = result.latents.view(3, 2, STEPS + 1, -1)
    assert torch.equal(pairs[:, 0, 0], pairs[:, 1, 0])
    assert not torch.equal(pairs[:, 0, 1], pairs[:, 1, 1])


def test_bfloat16_policy_keeps_float32_log_probs() -> None:
    policy = ToyPolicy(dtype=torch.bfloat16)
    config = SamplingConfig(keep_velocity=True)
    result = Sampler(policy, schedule_of("sde"), config).sample(prompt_batch(policy))
    assert result.velocities is not None and result.velocities.dtype == torch.bfloat16
    assert result.log_probs.dtype == result.latents.dtype == torch.float32


class Recorder:
    """A judge in a thread: the first candidate wins, after a pause."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.requests: list[JudgeRequest] = []
        self.pool = ThreadPoolExecutor(1)

    def judge(self, request: JudgeRequest) -> Judgement:
        time.sleep(self.pause)
        return Judgement.from_pairs([1.0] * len(request.prompts))

    def __call__(self, request: JudgeRequest) -> Future[Judgement]:
        self.requests.append(request)
        return self.pool.submit(self.judge, request)


def test_requests_hold_the_chunk_and_nothing_else() -> None:
    policy, recorder = ToyPolicy(), Recorder()
    sampler = Sampler(policy, schedule_of("sde"), SamplingConfig(), {"arr": recorder})
    first = prompt_batch(policy, 0, 2)
    rows = ({"rubric": "a"}, {"rubric": "b"})
    second = PromptBatch((5, 3), ("x1", "y2"), policy.encode(["x1", "y2"]), metadata=rows)
    chunks = sampler.iterate([first, second], policy_version=4)
    assert [r.prompt_ids for r in recorder.requests] == [(0, 1), (5, 3)]
    assert [r.metadata for r in recorder.requests] == [({}, {}), rows]
    assert [len(group) for group in recorder.requests[0].images] == [2, 2]
    assert all(c.trajectories.policy_version == 4 for c in chunks)
    direct = policy.decode(chunks[1].trajectories.final)
    assert [i.getpixel((0, 0)) for i in recorder.requests[1].images[1]] == [
        i.getpixel((0, 0)) for i in direct[2:]
    ]


def test_judging_hides_behind_sampling() -> None:
    policy = ToyPolicy()
    original = policy.velocity

    def slow(latents: Tensor, sigma: Tensor, conditions: Any) -> Tensor:
        time.sleep(0.02)
        return original(latents, sigma, conditions)

    policy.velocity = slow  # type: ignore[method-assign]
    sampler = Sampler(policy, schedule_of("sde"), SamplingConfig(), {"arr": Recorder(0.08)})
    chunks = sampler.iterate([prompt_batch(policy, n, 1) for n in range(8)])
    assert hidden_share(chunks) >= 0.8
    assert all(c.seconds["judging"] >= 0.075 for c in chunks)
    assert sum(c.seconds["waiting"] for c in chunks) >= 0.04


def test_failures_are_kept_per_judge_and_per_chunk(caplog: pytest.LogCaptureFixture) -> None:
    policy = ToyPolicy()
    started = threading.Event()

    def refuses(request: JudgeRequest) -> Future[Judgement]:
        raise ConnectionError("no route")

    def fails_second(request: JudgeRequest) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        if 1 in request.prompt_ids:
            future.set_exception(RuntimeError("broken"))
        else:
            future.set_result(Judgement.from_pairs([-1.0]))
        return future

    def never(request: JudgeRequest) -> Future[Judgement]:
        started.set()
        return Future()

    def other_shape(request: JudgeRequest) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        future.set_result(Judgement.from_pairs([1.0, 1.0]))
        return future

    judges = {"a": refuses, "b": fails_second, "c": never, "d": other_shape}
    config = SamplingConfig(judge_timeout=0.05)
    sampler = Sampler(policy, schedule_of("sde"), config, judges)
    first, second = sampler.iterate([prompt_batch(policy, n, 1) for n in range(2)])
    assert "no route" in first.failures["a"] and "no route" in second.failures["a"]
    assert "b" not in first.failures and "broken" in second.failures["b"]
    assert "no answer within" in first.failures["c"]
    assert "(2, 2)" in first.failures["d"]
    assert first.judgements["b"].wins is not None
    assert float(first.judgements["b"].wins[0, 0, 1]) == -1
    for name in ("a", "c", "d"):
        wins = first.judgements[name].wins
        assert wins is not None and bool(wins[0, 0, 1].isnan())
    assert "judge a failed" in caplog.text


def test_latents_that_are_not_finite_lose_their_verdict() -> None:
    policy = ToyPolicy()
    original = policy.velocity

    def breaks(latents: Tensor, sigma: Tensor, conditions: Any) -> Tensor:
        v = original(latents, sigma, conditions).clone()
        v[2:4] = float("nan")
        return v

    policy.velocity = breaks  # type: ignore[method-assign]
    sampler = Sampler(policy, schedule_of("sde"), SamplingConfig(), {"arr": Recorder()})
    (chunk,) = sampler.iterate([prompt_batch(policy)])
    assert chunk.trajectories.finite.tolist() == [True, False, True]
    wins = chunk.judgements["arr"].wins
    assert wins is not None
    assert wins[:, 0, 1].isnan().tolist() == [False, True, False]
    assert "not finite" in chunk.judgements["arr"].errors[0]


def test_interrupt_cancels_what_is_under_way() -> None:
    policy = ToyPolicy()
    futures: list[Future[Judgement]] = []

    def pending(request: JudgeRequest) -> Future[Judgement]:
        if len(futures) == 1:
            raise KeyboardInterrupt
        futures.append(Future())
        return futures[-1]

    sampler = Sampler(policy, schedule_of("sde"), SamplingConfig(), {"arr": pending})
    with pytest.raises(KeyboardInterrupt):
        sampler.iterate([prompt_batch(policy, n, 1) for n in range(3)])
    assert futures[0].cancelled()


def test_staleness() -> None:
    policy = ToyPolicy()
    config = SamplingConfig(max_staleness=1)
    sampler = Sampler(policy, schedule_of("sde"), config, {"arr": Recorder()})
    batches = [prompt_batch(policy, n, 1) for n in range(4)]
    sampler.iterate(batches[:1], 0, upcoming=batches[1])
    policy.shift_weights()
    (ahead,) = sampler.iterate(batches[1:2], 1, upcoming=batches[2])
    assert ahead.trajectories.policy_version == 0
    (fresh,) = sampler.iterate(batches[2:3], 3, upcoming=batches[3])
    assert fresh.trajectories.policy_version == 3
    (other,) = sampler.iterate(batches[:1], 3)
    assert other.trajectories.batch.ids == (0,)
    on_policy = Sampler(policy, schedule_of("sde"), SamplingConfig(), {"arr": Recorder()})
    on_policy.iterate(batches[:1], 0, upcoming=batches[1])
    (chunk,) = on_policy.iterate(batches[1:2], 1)
    assert chunk.trajectories.policy_version == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 1}, "candidates"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"judge_timeout": 0.0}, "judge_timeout"),
    ],
    ids=lambda value: str(value),
)
def test_bad_config(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_bad_training_window() -> None:
    with pytest.raises(ValueError, match="never trained"):
        SamplingConfig(train_window=STEPS).trained(STEPS)
    with pytest.raises(ValueError, match="train_steps"):
        SamplingConfig(train_steps=3, train_window=2).trained(STEPS)
    with pytest.raises(ValueError, match="of one number"):
        PromptBatch((1, 2), ("a",), {"condition": torch.zeros(2, 6)})


def test_every_judge_has_its_own_time() -> None:
    def never(request: JudgeRequest) -> Future[Judgement]:
        return Future()

    def later(request: JudgeRequest) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        answer = Judgement.from_pairs([0.0])
        threading.Timer(0.3, future.set_result, [answer]).start()
        return future

    policy = ToyPolicy()
    config = SamplingConfig(judge_timeout=60.0, judge_timeouts={"slow": 0.05})
    sampler = Sampler(policy, schedule_of("sde"), config, {"slow": never, "later": later})
    (chunk,) = sampler.iterate([prompt_batch(policy, 0, 1)])
    assert chunk.failures == {"slow": "no answer within 0.05 s"}
