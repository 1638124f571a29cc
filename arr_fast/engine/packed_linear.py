"""Linear layers with weights prepacked for oneDNN: a faster float32 GEMM on a CPU.

Packing reorders a weight once into the blocked layout that oneDNN's kernels read, in place of a
reorder (or a slower plain-layout kernel) in every call. The layer's own weight stays where it is,
so state dicts and weight updates work; the packed copy costs the same memory again.

Inductor would need the packed weight as a frozen constant, so compiled layers reach it through an
opaque op that finds the packed copy by the weight's address; everything around the GEMM is fused.

oneDNN compiles a GEMM for every number of rows and keeps it: measured 0.6 MiB each, in two caches
of 1024 entries, and forests seldom have the same number of rows twice. `bound_primitive_caches`
keeps a few.
"""

from __future__ import annotations

import os
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

# Largest decoder, in bytes of linear weights, that "auto" packs: the copy doubles them.
AUTO_LIMIT = 2 << 30
_TYPICAL_ROWS = 1024
# A forward uses ten or so GEMM shapes, again in every layer; compiling one takes about 0.3 ms.
_KEPT_PRIMITIVES = "64"
_BY_ADDRESS: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()


class PackedLinear(nn.Linear):
    """Computes what a `nn.Linear` computes, from a packed copy of its weight.

    Args:
        linear: The layer to stand in for; shares its parameters.
    """

    def __init__(self, linear: nn.Linear) -> None:
        # Not nn.Linear's own __init__, which would allocate another weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.repack()

    def repack(self) -> None:
        """Reads the weight again, after it changed."""
        weight = self.weight.detach()
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        _BY_ADDRESS[weight.data_ptr()] = self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            result: Tensor = packed_linear(x, self.weight, self.bias)
            return result
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], outside of any compiled graph."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


@torch.library.custom_op("arr_fast::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times a weight [out, in] that a live `PackedLinear` has packed."""
    return _BY_ADDRESS[weight.data_ptr()].multiply(x)


@packed_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing helps: float32 on a CPU with oneDNN."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


def bound_primitive_caches() -> None:
    """Bounds oneDNN's own cache of compiled primitives, and that of PyTorch's bridge to it.

    Both read their environment variable when they are first used, so a process that has run oneDNN
    before keeps what it has. Variables that are set already are left alone.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KEPT_PRIMITIVES)
    os.environ.setdefault("LRU_CACHE_CAPACITY", _KEPT_PRIMITIVES)


def pack_linears(layers: nn.ModuleList) -> None:
    """Replaces every `nn.Linear` inside decoder layers by its packed stand-in."""
    bound_primitive_caches()
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))


def release_linears(layers: nn.ModuleList) -> None:
    """Frees the packed copies; `repack_linears` makes them again."""
    for module in layers.modules():
        if isinstance(module, PackedLinear):
            module.packed = torch.empty(0)


def repack_linears(layers: nn.ModuleList) -> None:
    """Packs anew after the weights changed or moved."""
    for module in layers.modules():
        if isinstance(module, PackedLinear):
            module.repack()


def linear_bytes(layers: nn.ModuleList) -> int:
    """Bytes of the linear weights inside decoder layers."""
    return sum(
        m.weight.numel() * m.weight.element_size()
        for m in layers.modules()
        if isinstance(m, nn.Linear)
    )
