"""Packed linears and MLPs compute what the modules they stand in for compute."""

from __future__ import annotations

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
