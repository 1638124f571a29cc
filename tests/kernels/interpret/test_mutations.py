"""Every mask, rounding and gradient term of the kernels, broken on purpose: the checks must notice.

A mutation replaces one expression of a kernel's source; the mutated file is loaded beside the real
one and run through the same checks as the real kernel. A check that passes on a broken kernel is
the defect here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels.forests import Node, pack
from tests.kernels.interpret import test_prefix_attention as attention
from tests.kernels.interpret import test_verdict_head as head
from tests.kernels.mutations import load
from tests.ops.rpo_checks import check_loss, check_step

pytestmark = pytest.mark.slow

ATTENTION = {
    "last block's keys unmasked": (
        "is_visible_MN = is_key_N[None, :]",
        "is_visible_MN = is_key_N[None, :] | True",
    ),
    "own part not causal": ("& (key_N[None, :] <= row_M[:, None])", ""),
    "own part sees siblings": ("& (key_N[None, :] >= own_start_M[:, None])", ""),
    "no running maximum": (
        "block_max_M = tl.maximum(running_max_M, tl.max(scores_MN, 1))",
        "block_max_M = tl.max(scores_MN, 1)",
    ),
    "accumulator not rescaled": ("accumulator_MD * rescale_M[:, None]\n", "accumulator_MD\n"),
    "sum not rescaled": ("running_sum_M * rescale_M + tl.sum", "running_sum_M + tl.sum"),
    "pool read as new rows": (
        "is_pooled = tl.load(runs_ptr + run * 3) == 1",
        "is_pooled = tl.load(runs_ptr + run * 3) == 7",
    ),
    "first run skipped": (
        "for run in range(run_begin, run_end)",
        "for run in range(run_begin + 1, run_end)",
    ),
    "own keys start at the tile": (
        "first_own = tl.load(own_start_ptr + first_row)",
        "first_own = first_row",
    ),
    "own part twice in a split": (
        "tl.where(with_own == 1, first_row + tile_rows, first_own)",
        "first_row + tile_rows",
    ),
    "wrong head of the group": (
        "kv_head * GROUP + offsets_m % GROUP",
        "kv_head * GROUP + offsets_m * 0",
    ),
    "merge ignores weights": (
        "weight_M = tl.exp2(lse_M - safe_max_M)",
        "weight_M = tl.exp2(lse_M * 0.0)",
    ),
    "merge drops the last part": (
        "part_row = tl.load(slot_row_ptr + part * 2, mask=part < slots, other=-1)",
        "part_row = tl.load(slot_row_ptr + part * 2 + 2, mask=part + 1 < slots, other=-1)",
    ),
    "padding row written": ("out = torch.zeros(", "out = torch.ones("),
}
HEAD = {
    "plain weight for one-plus": ("weight_H += 1.0", "weight_H += 0.0"),
    "epsilon ignored": ("tl.sum(square_H) / hidden_size + eps", "tl.sum(square_H) / hidden_size"),
    "label takes a neighbour's variant": ("(offsets_r < end)", "(offsets_r <= end)"),
    "no maximum in the labels": ("largest = tl.max(variant_R)", "largest = 0.0"),
    "padding of the vocabulary counted": (
        'tl.where(is_token_V[None, :], logits_NV, float("-inf"))',
        "logits_NV + 0.0",
    ),
    "vocabulary sum not rescaled": (
        "running_sum_N * tl.exp(running_max_N - safe_max_N) + tile_sum_N",
        "running_sum_N + tile_sum_N",
    ),
    "hidden tail dropped": (
        "for start in tl.range(0, hidden_size, BLOCK_H)",
        "for start in tl.range(0, hidden_size - BLOCK_H, BLOCK_H)",
    ),
    "merge drops a part": ("is_part_S = part_S < parts", "is_part_S = part_S < parts - 1"),
}
STEP = {
    "log_prob before rounding": ("stored_E.to(tl.float32) - mean_E", "x_next_E - mean_E"),
    "noise unscaled": (
        "mean_E + tl.load(std_ptr + sample) * noise_E.to(tl.float32)",
        "mean_E + noise_E.to(tl.float32)",
    ),
    "padding counted": (
        "tl.where(is_element_E, stored_E.to(tl.float32) - mean_E, 0.0)",
        "tl.where(is_element_E, stored_E.to(tl.float32) - mean_E, 1.0)",
    ),
    "coefficients exchanged": ("x_scale * x_E + v_scale * v_E", "v_scale * x_E + x_scale * v_E"),
    "constant dropped": ("- tl.log(std) - HALF_LOG_TWO_PI", "- tl.log(std)"),
    "next sample's std": ("std = tl.load(std_ptr + sample)", "std = tl.load(std_ptr)"),
}
LOSS = {
    "clip side": (
        "tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)",
        "tl.maximum(ratio, 1.0 - clip_low)",
    ),
    "gradient flows through the clip": (
        "slope = tl.where(policy >= clipped_policy, policy, 0.0)",
        "slope = tl.where(policy >= -1.0e30, policy, 0.0)",
    ),
    "log_prob slope without the ratio": (
        "tl.where(policy >= clipped_policy, policy, 0.0) *",
        "tl.where(policy >= clipped_policy, -advantage, 0.0) *",
    ),
    "reference gradient dropped": ("grad_E += ref_scale * (", "grad_E += 0.0 * ref_scale * ("),
    "reference gradient's sign": (
        "ref_scale = beta * 2.0 * kl_weight / elements",
        "ref_scale = -beta * 2.0 * kl_weight / elements",
    ),
    "velocity KL's factor": ("ref_scale = beta * 2.0 / elements", "ref_scale = beta / elements"),
    "beta missing in log_prob_diff": ("log_prob_slope += beta", "log_prob_slope += 0.0"),
    "guard's drift dropped": (
        "std * (log_ratio + weight * v_scale * v_scale * mean_drift)",
        "std * log_ratio",
    ),
    "guard's drift gradient dropped": ("grad_E += old_scale * (", "grad_E += 0.0 * old_scale * ("),
    "guard without dt": ("policy_scale = -1.0 / tl.load(dt_ptr + sample)", "policy_scale = 1.0"),
    "guard's slope": ("ratio_slope = std", "ratio_slope = 1.0"),
    "x' - mu without v": (
        "error_E = x_next_E - (x_scale * x_E + v_scale * v_E)",
        "error_E = x_next_E - x_scale * x_E",
    ),
    "gradient's error without v": (
        "grad_E = error_scale * (x_next_E - (x_scale * x_E + v_scale * v_E))",
        "grad_E = error_scale * (x_next_E - x_scale * x_E)",
    ),
    "incoming gradient ignored": ("error_scale = grad_loss * tl.load", "error_scale = tl.load"),
    "one sample's sums for all": (
        "    partial_ptr += sample.to(tl.int64) * blocks\n    plane",
        "    plane",
    ),
}


def run_attention(module: ModuleType) -> None:
    rows = attention.rows_of(2)
    trees = [
        attention.siblings(21, [5, 18, 9], cached=True),
        [Node(None, 11, children=[1, 2]), Node(0, 9, children=[3]), Node(0, 3), Node(1, 6)],
    ]
    for split_tokens in (None, 8):
        forest = pack(trees, rows_per_tile=rows, split_tokens=split_tokens, padding_rows=1)
        for sharpness in (1.0, 60.0):
            attention.check(
                forest,
                query_heads=4,
                kv_heads=2,
                head_dim=64,
                dtype=torch.float32,
                sharpness=sharpness,
                launch=module.prefix_attention,
            )


def run_head(module: ModuleType) -> None:
    launch = module.verdict_head
    head.check(head.draw(5, 100, (2, 3), 700, torch.float32), unit_offset=True, launch=launch)
    small = head.draw(3, 64, (1, 2), 33, torch.float32)
    head.check({**small, "hidden": small["hidden"] * 1e-4}, eps=1e-5, launch=launch)
    large = head.draw(3, 64, (2, 2), 600, torch.float32)
    for name, factor in (("hidden", 100), ("vocab_weight", 80), ("label_rows", 80)):
        large[name] = large[name] * factor
    head.check(large, launch=launch)


def run_step(module: ModuleType) -> None:
    check_step("triton", "sde", (3, 127), torch.float32)
    check_step("triton", "sde", (2, 2, 90), torch.float16)


def run_loss(module: ModuleType) -> None:
    for kl in ("none", "latent_mean", "velocity", "log_prob_diff"):
        check_loss("triton", (4, 301), torch.float32, kl=kl, beta=0.3, quadrants=True)
        check_loss("triton", (4, 301), torch.float32, kl=kl, beta=0.3, guard=True)


RUNNERS = {
    "prefix_attention": (run_attention, ATTENTION),
    "verdict_head": (run_head, HEAD),
    "sde_step": (run_step, STEP),
    "rpo_loss": (run_loss, LOSS),
}
CASES = [
    pytest.param(name, mutation, id=f"{name}-{title.replace(' ', '_')}")
    for name, (_, mutations) in RUNNERS.items()
    for title, mutation in mutations.items()
]


@pytest.mark.parametrize(("name", "mutation"), CASES)
def test_a_broken_kernel_is_noticed(
    name: str, mutation: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(name, mutation, tmp_path)
    monkeypatch.setitem(sys.modules, f"arr_fast_kernels.{name}", module)
    with pytest.raises(AssertionError):
        RUNNERS[name][0](module)


@pytest.mark.parametrize("name", RUNNERS)
def test_the_unbroken_kernel_passes(name: str, tmp_path: Path) -> None:
    RUNNERS[name][0](load(name, ("import torch\n", "import torch\n"), tmp_path))
