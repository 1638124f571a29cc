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
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

# Largest decoder, in bytes of linear weights, that "auto" packs: the copy doubles them.
AUTO_LIMIT = 2 << 30
_TYPICAL_ROWS = 1024
# Rows of one piece of an MLP: as many as fill the cache, but enough that reading the weights again
# for each piece costs nothing.
_CACHE_BYTES = 1792 << 10
_LEAST_ROWS = 256
_SWIGLU = ("gate_proj", "up_proj", "down_proj")
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

    def multiply(self, x: Tensor, then: str = "none") -> Tensor:
        """x [..., in] -> [..., out], outside of any compiled graph.

        Args:
            x: Input.
            then: A pointwise function of oneDNN ("none", "swish") that the product passes through.
        """
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, then, [], "")
        return out

    def multiply_onto(self, x: Tensor, factor: Tensor) -> Tensor:
        """x [..., in] times the weight, times a factor [..., out] element by element."""
        product = torch.ops.mkldnn._linear_pointwise.binary
        out: Tensor = product(x, factor, self.packed, self.bias, "mul")
        return out


class PackedMLP(nn.Module):
    """A SwiGLU MLP whose activation and gating happen inside the products that feed them.

    Many rows run in pieces, so that what lies between two products stays in the cache.

    Args:
        mlp: The MLP to stand in for, its linears packed already.
    """

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (getattr(mlp, name) for name in _SWIGLU)
        self._row_bytes = self.up_proj.out_features * self.up_proj.weight.element_size()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        if torch.compiler.is_compiling():
            out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
            return out
        pieces = -(-x.shape[-2] // max(_LEAST_ROWS, _CACHE_BYTES // self._row_bytes))
        if pieces == 1:
            return self._multiply(x)
        return torch.cat([self._multiply(part) for part in x.tensor_split(pieces, -2)], -2)

    def _multiply(self, x: Tensor) -> Tensor:
        gate = self.gate_proj.multiply(x, then="swish")
        out: Tensor = self.down_proj.multiply(self.up_proj.multiply_onto(x, gate))
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
    """Replaces every `nn.Linear` inside decoder layers, and SwiGLU MLPs, by packed stand-ins."""
    bound_primitive_caches()
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if _is_swiglu(child):
                setattr(parent, name, PackedMLP(child))


@torch.inference_mode()
def _is_swiglu(module: nn.Module) -> bool:
    """Whether a module computes down(silu(gate(x)) * up(x)), by its parts and by a trial."""
    parts = dict(module.named_children())
    activation = parts.pop("act_fn", None)
    if not isinstance(activation, nn.SiLU | SiLUActivation) or set(parts) != set(_SWIGLU):
        return False
    if not all(isinstance(part, PackedLinear) for part in parts.values()):
        return False
    gate: PackedLinear = parts["gate_proj"]  # type: ignore[assignment]
    trial = torch.linspace(-2.0, 2.0, 2 * gate.in_features).view(2, -1)
    given, ours = module(trial), PackedMLP(module)(trial)
    return bool((given - ours).abs().max() <= 1e-4 * (1 + given.abs().max()))


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
