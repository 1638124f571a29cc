"""verdict_head equals the full logits, without ever holding them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arr_fast.ops import torch_impl, verdict_head
from arr_fast.ops.verdict_head import check_verdict_head

EPS = 1e-6


def case(
    rows: int = 5,
    hidden: int = 48,
    vocab: int = 300,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=make) * 3
    norm = torch.rand(hidden, generator=make) + 0.5
    weight = torch.randn(vocab, hidden, generator=make)
    ptr = torch.tensor([0, 1, 4], dtype=torch.int32)
    return x.to(dtype), norm.to(dtype), weight.to(dtype), ptr


def full_logits(x: Tensor, norm: Tensor, weight: Tensor, unit_offset: bool) -> Tensor:
    """All logits in float64."""
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return x * (norm.double() + float(unit_offset)) @ weight.double().T


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("rows", [1, 63])
def test_equals_full_logits(impl: str, unit_offset: bool, rows: int) -> None:
    x, norm, weight, ptr = case(rows)
    tokens = torch.tensor([7, 100, 3, 299])
    logits = full_logits(x, norm, weight, unit_offset)
    got, lse = verdict_head(x, norm, EPS, unit_offset, weight[tokens], ptr, weight, impl)
    expected = torch.stack([logits[:, 7], logits[:, tokens[1:]].logsumexp(-1)], -1)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=2e-5, rtol=1e-6)
    assert got.dtype == lse.dtype == torch.float32


def test_streaming_over_the_vocabulary_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    x, norm, weight, ptr = case(vocab=1001)
    rows = weight[:4]
    _, whole = verdict_head(x, norm, EPS, False, rows, ptr, weight, "torch")
    monkeypatch.setattr(torch_impl, "_VOCAB_CHUNK", 77)
    _, chunked = verdict_head(x, norm, EPS, False, rows, ptr, weight, "torch")
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)


def test_without_label_mass_the_vocabulary_is_not_touched() -> None:
    x, norm, weight, ptr = case()
    labels, lse = verdict_head(x, norm, EPS, False, weight[:4], ptr, weight[:0], "torch")
    assert labels.shape == (5, 2) and lse.shape == (0,)


def test_low_precision_is_as_good_as_eager() -> None:
    x, norm, weight, _ = case(dtype=torch.bfloat16)
    exact = full_logits(x, norm, weight, False)[:, :4]
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)
    eager = torch.nn.functional.linear(norm * normed.to(x.dtype), weight[:4])
    single = torch.arange(5, dtype=torch.int32)
    got, _ = verdict_head(x, norm, EPS, False, weight[:4], single, weight[:0], "torch")
    bound = (eager.double() - exact).abs().max() + 4 * torch.finfo(torch.bfloat16).eps
    assert (got.double() - exact).abs().max() <= bound


def test_op_contract() -> None:
    x, norm, weight, ptr = case()
    torch.library.opcheck(verdict_head, (x, norm, EPS, False, weight[:4], ptr, weight, "torch"))
    with pytest.raises(RuntimeError, match="inference only"):
        leaf = x.clone().requires_grad_()
        verdict_head(leaf, norm, EPS, False, weight[:4], ptr, weight, "torch")[0].sum().backward()


@pytest.mark.parametrize(
    "position,value,message",
    [
        (0, torch.zeros(3), "hidden must be"),
        (1, torch.zeros(7), "norm_weight must be"),
        (4, torch.zeros(4, 7), "label_rows must be"),
        (4, torch.zeros(4, 48, dtype=torch.float16), "label_rows is torch.float16"),
        (5, torch.zeros(3), "label_ptr must be int32"),
        (5, torch.tensor([0, 3, 3, 4], dtype=torch.int32), "label_ptr must rise from 0 to 4"),
        (5, torch.tensor([0, 2, 5], dtype=torch.int32), "label_ptr must rise from 0 to 4"),
        (6, torch.zeros(9, 5), "vocab_weight must be"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_bad_arguments_are_named(position: int, value: object, message: str, impl: str) -> None:
    x, norm, weight, ptr = case()
    args = [x, norm, EPS, False, weight[:4], ptr, weight, impl]
    args[position] = value
    with pytest.raises(ValueError, match=message):
        verdict_head(*args)


def test_an_unknown_impl_is_named() -> None:
    x, norm, weight, ptr = case()
    with pytest.raises(ValueError, match="impl must be torch, triton or reference, got 'flash'"):
        verdict_head(x, norm, EPS, False, weight[:4], ptr, weight, "flash")


@pytest.mark.parametrize(
    ("position", "name"),
    [(1, "norm_weight"), (4, "label_rows"), (5, "label_ptr"), (6, "vocab_weight")],
)
def test_labels_on_another_device_are_named(position: int, name: str) -> None:
    x, norm, weight, ptr = case()
    args = [x, norm, EPS, False, weight[:4], ptr, weight, "torch"]
    args[position] = args[position].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, hidden is on cpu"):
        check_verdict_head(*args[:2], *args[4:7])
