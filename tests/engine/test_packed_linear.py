"""Packed linears and MLPs compute what they stand in for; memory does not grow with row counts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP

from arr_fast.engine.packed_linear import (
    PackedLinear,
    PackedMLP,
    can_pack,
    pack_linears,
    repack_linears,
)

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="needs oneDNN"
)

# A process of its own: oneDNN reads its settings once, and pytest's process has long used it.
GROWTH = """
import psutil, torch
from torch import nn
from arr_fast.engine.packed_linear import pack_linears

torch.set_num_threads(1)
layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 96), nn.Linear(96, 64))])
pack_linears(layers)
x = torch.randn(800, 64)
rss = []
with torch.inference_mode():
    for begin in (100, 300, 500):
        for rows in range(begin, begin + 200):
            layers[0](x[:rows])
        rss.append(psutil.Process().memory_info().rss >> 20)
print(rss[-1] - rss[0])
"""


class Clipped(Qwen3VLTextMLP):
    """The parts of a SwiGLU MLP with another formula."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-0.01, 0.01)


def mlp_layer(kind: type[nn.Module] = Qwen3VLTextMLP, bias: bool = False) -> nn.ModuleList:
    torch.manual_seed(0)
    config = Qwen3VLTextConfig(hidden_size=96, intermediate_size=160, hidden_act="silu")
    mlp = kind(config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        if bias:
            old = getattr(mlp, name)
            setattr(mlp, name, nn.Linear(old.in_features, old.out_features))
    return nn.ModuleList([nn.ModuleDict({"mlp": mlp, "o_proj": nn.Linear(96, 96)})])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 383, 800, 9000])
def test_a_packed_mlp_equals_its_formula_in_float64(rows: int, bias: bool) -> None:
    layers = mlp_layer(bias=bias)
    mlp = layers[0]["mlp"]
    x = torch.randn(1, rows, 96)
    with torch.inference_mode():
        gated = nn.functional.silu(double(mlp.gate_proj, x.double()))
        exact = double(mlp.down_proj, gated * double(mlp.up_proj, x.double()))
        pack_linears(layers)
        packed = layers[0]["mlp"]
        assert type(packed) is PackedMLP and type(layers[0]["o_proj"]) is PackedLinear
        assert (packed(x) - exact).abs().max() < 2e-6


def double(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if linear.bias is None else linear.bias.double()
    return nn.functional.linear(x, linear.weight.double(), bias)


def test_an_mlp_with_another_formula_is_left_as_it_is() -> None:
    layers = mlp_layer(Clipped)
    x = torch.randn(1, 7, 96)
    with torch.inference_mode():
        before = layers[0]["mlp"](x)
        pack_linears(layers)
        assert type(layers[0]["mlp"]) is Clipped
        assert (layers[0]["mlp"](x) - before).abs().max() < 1e-6


def test_packing_keeps_state_dict_and_follows_new_weights() -> None:
    layers = mlp_layer()
    names = set(layers.state_dict())
    pack_linears(layers)
    assert set(layers.state_dict()) == names
    x = torch.randn(1, 5, 96)
    with torch.inference_mode():
        before = layers[0]["mlp"](x)
        layers[0]["mlp"].down_proj.weight.mul_(2)
        repack_linears(layers)
        assert (layers[0]["mlp"](x) - 2 * before).abs().max() < 1e-6


@pytest.mark.parametrize("rows", [1, 63, 127])
def test_a_packed_layer_multiplies_as_the_plain_one(rows: int) -> None:
    torch.manual_seed(rows)
    plain = nn.Linear(48, 40)
    x = torch.randn(rows, 48)
    want = (x.double() @ plain.weight.double().T + plain.bias.double()).detach()
    with torch.no_grad():
        got = PackedLinear(plain)(x)
        eager = plain(x)
    bound = 4 * torch.finfo(torch.float32).eps * float(want.abs().max())
    assert (got - want).abs().max() <= (eager - want).abs().max() + bound


def test_only_plain_linears_are_replaced_and_weights_are_shared() -> None:
    layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))])
    weight = layers[0][0].weight
    pack_linears(layers)
    assert isinstance(layers[0][0], PackedLinear)
    assert layers[0][0].weight is weight
    assert isinstance(layers[0][1], nn.LayerNorm)


def test_ever_new_row_counts_do_not_fill_memory() -> None:
    caches = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in caches}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [sys.executable, "-c", GROWTH], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    # Each of the 1200 products of the last two thirds would keep half a MiB.
    assert int(run.stdout) < 40, f"{run.stdout.strip()} MiB"
