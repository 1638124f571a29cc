"""Packed linear layers: the same products, and memory that does not grow with row counts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from arr_fast.engine.packed_linear import PackedLinear, can_pack, pack_linears

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="this PyTorch has no oneDNN"
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
