"""The machine's sgemm rate at a model's own shapes, and the linear work that the judge executes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class LinearShapes:
    """Linear layers of a dense decoder.

    Attributes:
        layers: Number of decoder layers.
        shapes: (out, in) of every linear layer of one decoder layer, by name.
    """

    layers: int
    shapes: dict[str, tuple[int, int]]

    @property
    def row_flops(self) -> int:
        """FLOPs of one row through one layer."""
        return 2 * sum(out * width for out, width in self.shapes.values())

    @property
    def key_value_flops(self) -> int:
        """FLOPs of one row through the key and value products of one layer."""
        pairs = (self.shapes["self_attn.k_proj"], self.shapes["self_attn.v_proj"])
        return 2 * sum(out * width for out, width in pairs)

    def executed(self, rows: int, read_rows: int) -> int:
        """FLOPs of a forward whose last layer is computed only for the rows that are read.

        Args:
            rows: Packed rows.
            read_rows: Rows at which a verdict is read.
        """
        whole = (self.layers - 1) * rows * self.row_flops
        last = rows * self.key_value_flops + read_rows * (self.row_flops - self.key_value_flops)
        return whole + last


def linear_shapes(decoder: Any) -> LinearShapes:
    """Shapes of a transformers text model.

    Raises:
        ValueError: A mixture of experts; its work depends on the routing.
    """
    layer = decoder.layers[0]
    if any(type(module).__name__.endswith("Experts") for module in layer.modules()):
        raise ValueError("the executed work of a mixture of experts depends on the routing")
    shapes = {
        name: (int(module.weight.shape[0]), int(module.weight.shape[1]))
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return LinearShapes(len(decoder.layers), shapes)


class GemmProbe:
    """Times the decoder's own products, layer after layer, with nothing between them.

    Args:
        shapes: The decoder's linear layers.
        rows: Rows of the forward that the rate is compared with.
        layers: Distinct weight sets to go through, so that caches are as cold as in a forward.
    """

    def __init__(self, shapes: LinearShapes, rows: int, layers: int = 4) -> None:
        self._flops = layers * rows * shapes.row_flops
        generator = torch.Generator().manual_seed(0)
        self._weights = [
            torch.randn(shape, generator=generator)
            for _ in range(layers)
            for shape in shapes.shapes.values()
        ]
        widths = {weight.shape[1] for weight in self._weights}
        self._inputs = {width: torch.randn(rows, width, generator=generator) for width in widths}
        self._outputs = {
            weight.shape[0]: torch.empty(rows, weight.shape[0]) for weight in self._weights
        }

    def measure(self, passes: int = 2) -> float:
        """GFLOP/s, the best of a few passes."""
        best = np.inf
        with torch.inference_mode():
            for _ in range(passes):
                started = time.perf_counter()
                for weight in self._weights:
                    out = self._outputs[weight.shape[0]]
                    torch.mm(self._inputs[weight.shape[1]], weight.T, out=out)
                best = min(best, time.perf_counter() - started)
        return self._flops / best / 1e9
