"""The training step against autograd on the plain formula, and what must never change it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arr_fast.errors import ArrFastError
from arr_fast.rpo.advantages import Advantages, advantages, preferences
from arr_fast.rpo.budget import LiveBytes, rows_for_budget, step_bytes
from arr_fast.rpo.judging import Judgement
from arr_fast.rpo.loss import Objective, clip_from_nats
from arr_fast.rpo.packing import PackedRows, count_rows
from arr_fast.rpo.rollout import SamplingConfig, Trajectories
from arr_fast.rpo.sampler import Sampler
from arr_fast.rpo.step import TrainStep, check_on_policy, graph_count
from tests.rpo.test_sampler import KINDS, published_step, schedule_of
from tests.rpo.toy_policy import ToyPolicy, prompt_batch

STEPS = 5


def roll(
    policy: ToyPolicy,
    winners: list[float],
    *,
    kind: str = "sde",
    first: int = 0,
    compile: bool = False,
    **options: Any,
) -> tuple[Trajectories, Advantages]:
    """A chunk of prompts with given winners."""
    config = SamplingConfig(**options)
    batch = prompt_batch(policy, first, len(winners))
    sampled = Sampler(policy, schedule_of(kind), config, compile=compile).sample(batch)
    return sampled, advantages(preferences(Judgement.from_pairs(winners)), centred=False)


def plain_loss(
    policy: ToyPolicy,
    network: nn.Module,
    chunk: Trajectories,
    given: Advantages,
    objective: Objective,
    kind: str,
) -> Tensor:
    """Eq. 13 in float64, one row after the other, with autograd through everything."""
    reference = copy.deepcopy(policy.frozen).double()
    sigmas, total, rows = chunk.schedule.sigmas, torch.zeros((), dtype=torch.float64), 0
    for sample in range(len(chunk.latents)):
        prompt, candidate = divmod(sample, chunk.candidates)
        if float(given.weight[prompt, candidate]) == 0:
            continue
        advantage = float(given.value[prompt, candidate])
        condition = chunk.batch.conditions["condition"][prompt : prompt + 1].double()
        for step in chunk.trained[prompt].tolist():
            x = chunk.latents[sample : sample + 1, step].double()
            following = chunk.latents[sample : sample + 1, step + 1].double()
            time = torch.full((1,), float(sigmas[step]), dtype=torch.float64)
            v = network(x, time, condition)
            mean, std = published_step(kind, sigmas, step, x, v)
            squares = (following - mean) ** 2 / (2 * std**2)
            log_prob = (-squares - math.log(std) - 0.5 * math.log(2 * math.pi)).mean()
            log_ratio = log_prob - chunk.log_probs[sample, step].double()
            factor = 1.0
            if objective.guard:
                assert chunk.velocities is not None
                v_old = chunk.velocities[sample : sample + 1, step].double()
                mean_old, _ = published_step(kind, sigmas, step, x, v_old)
                drift = ((mean - mean_old) ** 2).mean() / (2 * std**2)
                log_ratio = std * (log_ratio + drift)
                factor = 1 / float(sigmas[step] - sigmas[step + 1])
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
            loss = factor * torch.maximum(-advantage * ratio, -advantage * clipped)
            with torch.no_grad():
                v_ref = reference(x, time, condition)
                mean_ref, _ = published_step(kind, sigmas, step, x, v_ref)
                reference_log_prob = (
                    -((following - mean_ref) ** 2) / (2 * std**2)
                    - math.log(std)
                    - 0.5 * math.log(2 * math.pi)
                ).mean()
            if objective.kl == "latent_mean":
                loss = loss + objective.beta * ((mean - mean_ref) ** 2).mean() / (2 * std**2)
            elif objective.kl == "velocity":
                loss = loss + objective.beta * ((v - v_ref) ** 2).mean()
            elif objective.kl == "log_prob_diff":
                loss = loss + objective.beta * (log_prob - reference_log_prob)
            total, rows = total + loss, rows + 1
    return total / rows


def gradient(parameters: dict[str, nn.Parameter]) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in parameters.values() if p.grad is not None])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("guard", [False, True], ids=["plain", "guard"])
@pytest.mark.parametrize("kl", ["none", "latent_mean", "velocity", "log_prob_diff"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_loss_and_gradient_are_the_plain_formulas(kind: str, kl: Any, guard: bool) -> None:
    policy = ToyPolicy()
    chunk, given = roll(
        policy, [1, 0, -1, math.nan, 1], kind=kind, train_steps=2, keep_velocity=guard
    )
    policy.shift_weights(0.03)
    packed = PackedRows([chunk], [given], 5)
    probe = TrainStep(policy, Objective(1.0, 100.0, guard=guard)).accumulate(packed).stats
    policy.module.zero_grad()
    # Some rows are clipped, on either side, and some are not.
    low, high = 0.3 * (1 - probe.ratio_min), 0.3 * (probe.ratio_max - 1)
    objective = Objective(low, high, 0.7, kl, guard=guard, log_reference=True)
    network = copy.deepcopy(policy.module).double()
    expected = plain_loss(policy, network, chunk, given, objective, kind)
    expected.backward()
    step = TrainStep(policy, objective)
    report = step.accumulate(packed)
    assert report.skipped is None and report.stats.rows == 12
    assert 0 < report.stats.clipped < 12
    assert report.stats.loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    theirs = gradient(dict(network.named_parameters()))
    assert relative(gradient(policy.trainable_parameters()), theirs) < 1e-5


def test_reference_gets_no_gradient_and_runs_only_when_it_must() -> None:
    policy = ToyPolicy()
    chunk, given = roll(policy, [1, -1])
    packed = PackedRows([chunk], [given], 4)
    calls = [0]
    original = policy.frozen.forward

    def counted(*args: Tensor) -> Tensor:
        calls[0] += 1
        return original(*args)

    policy.frozen.forward = counted  # type: ignore[method-assign]
    expected = {
        ("none", False): 0,
        ("latent_mean", False): len(packed),
        ("velocity", False): len(packed),
        ("log_prob_diff", False): 0,
        ("log_prob_diff", True): len(packed),
    }
    for (kl, logged), count in expected.items():
        calls[0] = 0
        objective = Objective(0.1, 0.1, 0.1, kl, log_reference=logged)  # type: ignore[arg-type]
        report = TrainStep(policy, objective).accumulate(packed)
        assert calls[0] == count, kl
        assert ("kl" in report.stats.summary(objective, 21)) == (count > 0)
    calls[0] = 0
    TrainStep(policy, Objective(0.1, 0.1, 0.0, "latent_mean")).accumulate(packed)
    assert calls[0] == 0
    keeping = TrainStep(policy, Objective(0.1, 0.1, 0.1, "latent_mean"))
    keeping.accumulate(packed, keep_reference=True)
    keeping.accumulate(packed)
    assert calls[0] == len(packed)


def test_latent_mean_pulls_to_the_reference() -> None:
    policy = ToyPolicy()
    policy.shift_weights(0.1)
    chunk, given = roll(policy, [1, -1, 1])
    no_reward = Advantages(given.value * 0, given.weight, 3, 0, 0, given.failed)
    packed = PackedRows([chunk], [no_reward], 6)
    step = TrainStep(policy, Objective(0.1, 0.1, 1.0, "latent_mean"))
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=5.0)
    kl = []
    for _ in range(20):
        optimizer.zero_grad()
        report = step.accumulate(packed)
        kl.append(report.stats.kl_sum)
        optimizer.step()
    assert kl[-1] < 0.5 * kl[0]


def test_log_prob_diff_gradient_does_not_depend_on_the_reference() -> None:
    gradients = []
    for scale, logged in ((0.0, False), (0.0, True), (0.5, True)):
        policy = ToyPolicy()
        with torch.no_grad():
            for parameter in policy.frozen.parameters():
                parameter.add_(scale)
        chunk, given = roll(policy, [1, -1])
        policy.shift_weights(0.02)
        objective = Objective(0.2, 0.2, 0.5, "log_prob_diff", log_reference=logged)
        TrainStep(policy, objective).accumulate(PackedRows([chunk], [given], 8))
        gradients.append(gradient(policy.trainable_parameters()))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[1], gradients[2])


def test_ratio_is_one_before_the_first_update() -> None:
    policy = ToyPolicy()
    chunk, given = roll(policy, [1, -1, 1, 1])
    objective = Objective(1e-4, 1e-4)
    report = TrainStep(policy, objective).accumulate(PackedRows([chunk], [given], 7))
    assert check_on_policy(report, objective) < 1e-6
    policy.shift_weights(0.05)
    moved = TrainStep(policy, objective).accumulate(PackedRows([chunk], [given], 7))
    with pytest.raises(ArrFastError, match="rollout and training disagree"):
        check_on_policy(moved, objective)


def test_bfloat16_drift_is_measured_and_recomputing_removes_it() -> None:
    policy = ToyPolicy(dtype=torch.bfloat16)
    chunk, given = roll(policy, [1, -1, 1])
    # The rollout's own log_probs with an error of bfloat16's size, as another kernel would make.
    noisy = chunk.log_probs + 1e-3 * torch.randn(chunk.log_probs.shape)
    chunk = Trajectories(
        chunk.batch, chunk.schedule, chunk.latents, noisy, None, chunk.trained, chunk.finite
    )
    packed = PackedRows([chunk], [given], 8)
    step = TrainStep(policy, Objective(0.1, 0.1))
    before = step.accumulate(packed).stats.drift
    assert 1e-4 < before < 1e-2
    assert step.recompute_log_probs(packed) == pytest.approx(before, rel=1e-3)
    assert step.accumulate(packed).stats.drift == 0.0


def test_two_updates_per_rollout_clip() -> None:
    policy = ToyPolicy()
    chunk, given = roll(policy, [1, -1, 1, -1])
    packed = PackedRows([chunk], [given], 8)
    objective = Objective(*[clip_from_nats(0.5, packed.elements)] * 2)
    step = TrainStep(policy, objective)
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=3e-3)
    fractions = []
    for _ in range(2):
        optimizer.zero_grad()
        report = step.accumulate(packed)
        fractions.append(report.stats.summary(objective, packed.elements)["clip_fraction"])
        optimizer.step()
    assert fractions[0] == 0 and fractions[1] > 0


@pytest.mark.parametrize("rows", [1, 3, 64], ids=lambda rows: f"R{rows}")
def test_packing_does_not_change_the_gradient(rows: int) -> None:
    policy = ToyPolicy()
    first, second = roll(policy, [1, 0, -1]), roll(policy, [0, 1], first=3)
    policy.shift_weights(0.01)
    objective = Objective(0.1, 0.1, 0.1, "latent_mean")
    chunks, given = [first[0], second[0]], [first[1], second[1]]
    whole = PackedRows(chunks, given, 24)
    assert whole.rows == count_rows(chunks, given) == 24
    TrainStep(policy, objective).accumulate(whole)
    expected = gradient(policy.trainable_parameters())
    policy.module.zero_grad()
    packed = PackedRows(chunks, given, rows, min_batches=9)
    assert len(packed) == max(9, -(-24 // rows))
    TrainStep(policy, objective).accumulate(packed)
    assert relative(gradient(policy.trainable_parameters()), expected) < 1e-5


def test_the_divisor_is_global() -> None:
    """Two ranks with 1 and 3 decided pairs add up to one process with 4."""
    policy = ToyPolicy()
    parts = [roll(policy, [0, 1, 0]), roll(policy, [1, -1, 1], first=3)]
    objective = Objective(0.1, 0.1)
    together = PackedRows([p[0] for p in parts], [p[1] for p in parts], 8)
    TrainStep(policy, objective).accumulate(together)
    expected = gradient(policy.trainable_parameters())
    policy.module.zero_grad()
    total = sum(count_rows([chunk], [given]) for chunk, given in parts)
    for chunk, given in parts:
        packed = PackedRows([chunk], [given], 8, min_batches=3)
        TrainStep(policy, objective).accumulate(packed, total_rows=total)
    assert relative(gradient(policy.trainable_parameters()), expected) < 1e-5


def test_no_decided_pair_skips() -> None:
    policy = ToyPolicy()
    chunk, given = roll(policy, [0, math.nan])
    objective = Objective(0.1, 0.1)
    report = TrainStep(policy, objective).accumulate(PackedRows([chunk], [given], 4))
    assert report.skipped == "no decided pair"
    assert all(p.grad is None for p in policy.module.parameters())
    # A rank without a decision of its own still runs its backwards beside the others.
    padded = PackedRows([chunk], [given], 4, min_batches=2)
    report = TrainStep(policy, objective).accumulate(padded, total_rows=8)
    assert report.skipped is None
    assert float(gradient(policy.trainable_parameters()).abs().sum()) == 0


@pytest.mark.parametrize("where", ["velocity", "weights"])
def test_nan_skips_and_says_why(where: str) -> None:
    policy = ToyPolicy()
    chunk, given = roll(policy, [1, -1])
    if where == "weights":
        with torch.no_grad():
            next(policy.module.parameters())[0, 0] = float("nan")
    else:
        original = policy.velocity
        policy.velocity = lambda *a: original(*a) * float("nan")  # type: ignore[method-assign]
    report = TrainStep(policy, Objective(0.1, 0.1)).accumulate(PackedRows([chunk], [given], 4))
    assert report.skipped is not None and "not finite" in report.skipped


def test_no_sync_covers_all_but_the_last() -> None:
    from contextlib import contextmanager

    policy = ToyPolicy()
    chunk, given = roll(policy, [1, -1])
    entered, losses = [0], []

    @contextmanager
    def no_sync() -> Any:
        entered[0] += 1
        yield

    packed = PackedRows([chunk], [given], 4)
    step = TrainStep(policy, Objective(0.1, 0.1))
    step.accumulate(packed, no_sync=no_sync, backward=losses.append)
    assert entered[0] == len(packed) - 1 and len(losses) == len(packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_high": math.inf}, "clip_high"),
        ({"kl": "exact"}, "kl must be one of"),
        ({"guard": True, "normalised": False}, "guard"),
    ],
    ids=lambda value: str(value),
)
def test_bad_objective(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_shapes_that_disagree() -> None:
    policy, other = ToyPolicy(), ToyPolicy((2, 5))
    chunk, given = roll(policy, [1, -1])
    packed = PackedRows([chunk], [given], 4)
    with pytest.raises(ValueError, match=r"latents have shape \(3, 7\), the policy \(2, 5\)"):
        TrainStep(other, Objective(0.1, 0.1)).accumulate(packed)
    with pytest.raises(ValueError, match="keep_velocity"):
        TrainStep(policy, Objective(0.1, 0.1, guard=True)).accumulate(packed)
    with pytest.raises(ValueError, match=r"chunk_advantages\[0\]"):
        PackedRows([chunk], [roll(policy, [1])[1]], 4)
    with pytest.raises(ValueError, match=r"chunks\[1\] has latents"):
        PackedRows([chunk, roll(other, [1, 1])[0]], [given, given], 4)
    with pytest.raises(ValueError, match="another schedule"):
        slow = Sampler(policy, schedule_of("sde", 7), SamplingConfig(train_window=4))
        longer = slow.sample(prompt_batch(policy, 0, 2))
        longer = Trajectories(
            longer.batch,
            longer.schedule,
            chunk.latents,
            longer.log_probs,
            None,
            longer.trained,
            longer.finite,
        )
        PackedRows([chunk, longer], [given, given], 4)
    ode, given = roll(policy, [1, -1], kind="ode")
    with pytest.raises(ValueError, match="no log_prob"):
        TrainStep(policy, Objective(0.1, 0.1)).accumulate(PackedRows([ode], [given], 4))


def test_budget_is_used_and_not_exceeded() -> None:
    policy = ToyPolicy((64, 96))
    objective = Objective(0.1, 0.1, 0.1, "latent_mean")
    conditions = policy.encode(["a prompt"])
    budget = 8_000_000
    rows = rows_for_budget(policy, objective, conditions, budget)
    assert 4 < rows < 256
    assert step_bytes(policy, objective, conditions, rows) <= budget
    assert step_bytes(policy, objective, conditions, int(rows * 1.2)) > budget
    with pytest.raises(ArrFastError, match="one row needs"):
        rows_for_budget(policy, objective, conditions, 1000)


def test_live_bytes_counts_what_lives() -> None:
    kept = torch.ones(1000)
    with LiveBytes([kept]) as counter:
        a = kept * 2
        b = a.view(10, 100)
        c = a + 1
        del a, b
        d = c * 3
    assert counter.peak == 8000 and counter.live == 8000
    del c, d
    assert counter.live == 0


@pytest.mark.compile
def test_compiled_equals_eager_and_never_recompiles() -> None:
    """50 iterations: other prompts, epochs, timesteps and numbers of decided pairs."""
    torch._dynamo.reset()
    before = graph_count()
    objective = Objective(0.01, 0.01, 0.1, "latent_mean")
    eager, compiled = ToyPolicy(), ToyPolicy()
    eager.shift_weights(0.02)
    compiled.shift_weights(0.02)
    config = SamplingConfig(train_steps=2)
    sampler = Sampler(compiled, schedule_of("sde"), config, compile=True)
    plain_sampler = Sampler(eager, schedule_of("sde"), config)
    step, plain_step = TrainStep(compiled, objective, compile=True), TrainStep(eager, objective)
    optimizer = torch.optim.SGD(compiled.module.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    graphs = 0
    for iteration in range(52):
        winners = torch.randint(-1, 2, (3,), generator=generator).float()
        winners[0] = 1
        given = advantages(preferences(Judgement.from_pairs(winners.tolist())))
        batch = prompt_batch(compiled, 3 * (iteration % 7), 3, epoch=iteration // 7)
        chunk = sampler.sample(batch)
        report = step.accumulate(PackedRows([chunk], [given], 4))
        assert report.skipped is None
        assert check_on_policy(report, objective) < 1e-6
        if iteration == 0:
            expected = plain_sampler.sample(batch)
            assert torch.allclose(chunk.latents, expected.latents, atol=1e-5)
            plain_step.accumulate(PackedRows([expected], [given], 4))
            ours = gradient(compiled.trainable_parameters())
            assert relative(ours, gradient(eager.trainable_parameters())) < 1e-5
        if iteration == 1:
            graphs = graph_count() - before
        optimizer.step()
        optimizer.zero_grad()
    assert graph_count() - before == graphs == 3
