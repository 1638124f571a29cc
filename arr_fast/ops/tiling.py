"""How a forest is cut into query tiles, by who computes its attention."""

from __future__ import annotations

import torch

# One tile of any size: implementations that gather a sibling block whole.
WHOLE = 1 << 30
# Ancestor tokens per piece of a split tile: fixed, so that results do not depend on the batch.
SPLIT_TOKENS = 512


def tile_rows(impl: str, group: int, head_dim: int, device: torch.device) -> int:
    """Most rows of a query tile.

    Args:
        impl: Resolved impl of `prefix_attention`.
        group: Query heads per key/value head.
        head_dim: Head dimension.
        device: Where it runs.
    """
    if impl != "triton":
        return WHOLE
    from arr_fast_kernels.configs import rows_per_tile

    return int(rows_per_tile(group, head_dim, device))


def should_split(impl: str, tiles: int, longest: int, kv_heads: int, device: torch.device) -> bool:
    """Whether a forest has too few tiles to fill a GPU, so that its ancestors should be split.

    One program handles one tile and one key/value head; under one program per multiprocessor some
    of the card would idle.

    Args:
        impl: Resolved impl of `prefix_attention`.
        tiles: Number of tiles before the split.
        longest: Ancestor tokens of the longest path.
        kv_heads: Key/value heads.
        device: Where it runs.
    """
    if impl != "triton" or device.type != "cuda":
        return False
    from arr_fast_kernels.configs import MAX_SPLIT_TILES

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    pieces = -(-longest // SPLIT_TOKENS)
    return bool(pieces > 1 and tiles * kv_heads < processors and tiles * pieces <= MAX_SPLIT_TILES)
