"""verdict_head: final norm, label logits and optional log-sum-exp over the vocabulary.

    x      = hidden / sqrt(mean(hidden^2) + eps) * (weight | 1 + weight)
    label  = logsumexp over the label's token variants of (x . label_row)
    lse    = logsumexp over the vocabulary of (x . vocab_row)

Nothing of size [N, V] is ever held. Legend: N read rows, H hidden size, R label rows, L labels,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.library.custom_op("arr_fast::verdict_head", mutates_args=())
def verdict_head(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    unit_offset: bool,
    label_rows: Tensor,
    label_ptr: Tensor,
    vocab_weight: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each label's logits, without the rest of the vocabulary.

    Args:
        hidden: [N, H], the decoder's output at the read rows, before the final norm.
        norm_weight: [H], RMSNorm weight.
        eps: RMSNorm epsilon.
        unit_offset: The norm multiplies by 1 + weight in place of weight.
        label_rows: [R, H], the gathered rows of the output embedding.
        label_ptr: int32 [L + 1]; label l owns rows label_ptr[l] to label_ptr[l + 1].
        vocab_weight: [V, H] to ask for the vocabulary's log-sum-exp, [0, H] otherwise.
        impl: "torch", "triton" or "reference".

    Returns:
        (label logits float32 [N, L], vocabulary log-sum-exp float32 [N], or [0] if not asked).

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit; the message names the argument.
    """
    check_verdict_head(hidden, norm_weight, label_rows, label_ptr, vocab_weight)
    result: tuple[Tensor, Tensor] = _launcher(impl)(
        hidden=hidden,
        norm_weight=norm_weight,
        eps=eps,
        unit_offset=unit_offset,
        label_rows=label_rows,
        label_ptr=label_ptr,
        vocab_weight=vocab_weight,
    )
    return result


def _launcher(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if impl == "torch":
        from arr_fast.ops.torch_impl import verdict_head_torch

        return verdict_head_torch
    if impl == "reference":
        from arr_fast.ops.reference import verdict_head_reference

        return verdict_head_reference
    if impl == "triton":
        from arr_fast_kernels.verdict_head import verdict_head as launch

        return launch
    raise ValueError(f"impl must be torch, triton or reference, got {impl!r}")


@verdict_head.register_fake
def _(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    unit_offset: bool,
    label_rows: Tensor,
    label_ptr: Tensor,
    vocab_weight: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rows, labels = hidden.shape[0], label_ptr.shape[0] - 1
    asked = rows if vocab_weight.shape[0] else 0
    return (
        hidden.new_empty((rows, labels), dtype=torch.float32),
        hidden.new_empty((asked,), dtype=torch.float32),
    )


def _no_backward(ctx: object, *grads: Tensor) -> None:
    raise RuntimeError("verdict_head is inference only; train on the plain logits")


verdict_head.register_autograd(_no_backward)


def check_verdict_head(
    hidden: Tensor,
    norm_weight: Tensor,
    label_rows: Tensor,
    label_ptr: Tensor,
    vocab_weight: Tensor,
) -> None:
    """Checks shapes, dtypes and devices; raises a ValueError that names the argument."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [N, H], got {tuple(hidden.shape)}")
    width = hidden.shape[1]
    if norm_weight.shape != (width,):
        raise ValueError(f"norm_weight must be [{width}], got {tuple(norm_weight.shape)}")
    for name, matrix in (("label_rows", label_rows), ("vocab_weight", vocab_weight)):
        if matrix.ndim != 2 or matrix.shape[1] != width:
            raise ValueError(f"{name} must be [*, {width}], got {tuple(matrix.shape)}")
        if matrix.dtype != hidden.dtype:
            raise ValueError(f"{name} is {matrix.dtype}, hidden is {hidden.dtype}")
    if label_ptr.ndim != 1 or label_ptr.shape[0] < 2 or label_ptr.dtype != torch.int32:
        raise ValueError(f"label_ptr must be int32 [L + 1], got {tuple(label_ptr.shape)}")
    for name, tensor in (
        ("norm_weight", norm_weight),
        ("label_rows", label_rows),
        ("label_ptr", label_ptr),
        ("vocab_weight", vocab_weight),
    ):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden is on {hidden.device}")
    # On a GPU a look at the values would wait for the device.
    if label_ptr.device.type == "cpu":
        ends = label_ptr.tolist()
        if ends[0] != 0 or ends[-1] != label_rows.shape[0] or ends != sorted(set(ends)):
            raise ValueError(f"label_ptr must rise from 0 to {label_rows.shape[0]}, got {ends}")
