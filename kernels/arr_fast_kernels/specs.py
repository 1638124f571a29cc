"""Representative workloads of every kernel: what is launched, what it must compute, and what it
must read and write.

A `Case` is one kernel at one shape and dtype. It knows the arguments' types (so that `aot.py` can
compile it for a GPU that is absent), its floating-point operations, the least bytes that any
implementation must move, and the bytes that ours moves. Those are counted from tile tables that the
caller's engine builds (`attention_traffic`); `aot.py` holds the elementwise kernels' bytes to the
loads and stores of the compiled kernel, and tests count both in the interpreter. Needs neither
triton nor a GPU.

Judges are Qwen3-VL 2B, 4B, 8B and 32B: (hidden, query heads, KV heads, head dim, vocabulary) of
their published text configs. Latents are FLUX's and Qwen-Image's: 16 channels at 1/8 size, packed 2
x 2, so (pixels / 16)^2 tokens of 64 numbers for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from arr_fast_kernels.configs import (
    LABEL_BLOCK_H,
    LABEL_WARPS,
    MAX_SPLIT_TILES,
    VOCAB_PART,
    AttentionConfig,
    attention_config,
    dot_precision,
    elementwise_config,
    padded_head_dim,
    rows_per_tile,
    vocab_config,
)
from arr_fast_kernels.traffic import BuildTables, ForestShape, attention_traffic

__all__ = ["MAX_SPLIT_TILES", "Case", "cases", "rows_per_tile"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# name: hidden, query heads, KV heads, head dim, vocabulary
JUDGES = {
    "qwen3-vl-2b": (2048, 16, 8, 128, 151936),
    "qwen3-vl-4b": (2560, 32, 8, 128, 151936),
    "qwen3-vl-8b": (4096, 32, 8, 128, 151936),
    "qwen3-vl-32b": (5120, 64, 8, 128, 151936),
}
# The other head dims that judges have: SmolVLM and small Qwen2-VL, Phi, Gemma.
OTHER_HEADS = {"heads8x4-d64": (8, 4, 64), "heads8x4-d96": (8, 4, 96), "heads8x4-d256": (8, 4, 256)}
LATENTS = {"flux-qwen-512px": 32 * 32 * 64, "flux-qwen-1024px": 64 * 64 * 64}
SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape.

    Attributes:
        op: the op's name; also the file that holds the kernel.
        kernel: the @triton.jit function.
        shape: readable name of the shape.
        dtype: "fp16", "bf16" or "fp32".
        arch: the architecture whose configuration this is.
        types: argument -> Triton type, without constexprs ("*bf16", "i32", "fp32").
        aligned: integer arguments that are multiples of 16 at this shape.
        constants: constexpr arguments.
        num_warps: and num_stages as launched.
        programs: programs of the grid.
        matrix: whether the shipped config must use the matrix units.
        flops: floating-point operations, multiply and add counted apart.
        least_bytes: inputs read once and outputs written once.
        bytes: requested by the kernel's loads and stores.
        hbm_bytes: what remains of `bytes` behind the L2 cache, under the model in
            `attention_traffic`.
        reason: why the configuration is what it is.
        counts: what else was counted: `attention_traffic`'s numbers for prefix_attention, and
            finalise_bytes of a latent kernel whose partial sums another kernel adds up.
    """

    op: str
    kernel: str
    shape: str
    dtype: str
    arch: str
    types: dict[str, str]
    aligned: frozenset[str]
    constants: dict[str, int | str | bool]
    num_warps: int
    num_stages: int
    programs: int
    matrix: bool
    flops: float
    least_bytes: float
    bytes: float
    hbm_bytes: float
    reason: str
    counts: dict[str, float] = field(default_factory=dict)


def cases(
    arch: str,
    build_tables: BuildTables,
    dtypes: tuple[str, ...] = ("fp16", "bf16"),
    *,
    reduced: bool = False,
) -> list[Case]:
    """Returns every case of an architecture.

    Args:
        arch: one of ARCHS.
        build_tables: packs the forest and cuts its tiles, as the engine does.
        dtypes: of fp16, bf16 and fp32.
        reduced: keeps the smallest judge and one latent size.
    """
    judges = dict(list(JUDGES.items())[:1]) if reduced else JUDGES
    others = {} if reduced else OTHER_HEADS
    latents = dict(list(LATENTS.items())[:1]) if reduced else LATENTS
    found: list[Case] = []
    for dtype in dtypes:
        for name, (hidden, query_heads, kv_heads, head_dim, vocab) in judges.items():
            heads = (query_heads, kv_heads, head_dim)
            found.append(attention_case(arch, build_tables, dtype, name, *heads))
            found += head_cases(arch, dtype, name, hidden, vocab)
        for name, heads in others.items():
            found.append(attention_case(arch, build_tables, dtype, name, *heads))
        found.append(merge_case(arch, dtype, *next(iter(judges.values()))[1:4]))
        for name, elements in latents.items():
            found += latent_cases(arch, dtype, name, elements)
    return found


def attention_case(
    arch: str,
    build_tables: BuildTables,
    dtype: str,
    name: str,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    config: AttentionConfig | None = None,
) -> Case:
    """`prefix_attention` over the standard forest; `config` None takes the shipped block sizes."""
    config = config or attention_config(arch, head_dim, DTYPES[dtype])
    shape = ForestShape()
    tables = build_tables(shape.paths(), config.block_m * kv_heads // query_heads)
    traffic = attention_traffic(
        shape, tables, query_heads, kv_heads, head_dim, config, DTYPES[dtype].itemsize
    )
    floats = dict.fromkeys(("out", "q", "k", "v", "k_pool", "v_pool"), f"*{dtype}")
    floats |= {"partial": "*fp32", "partial_lse": "*fp32"}
    integers = dict.fromkeys(("slot_row", "own_start", "runs", "tiles"), "*i32")
    strides = [f"stride_{t}{d}" for t in ("o", "q", "k", "v") for d in "th"]
    strides += ["stride_kpt", "stride_kph", "stride_vpt", "stride_vph"]
    return Case(
        op="prefix_attention",
        kernel="_prefix_attention_kernel",
        shape=name,
        dtype=dtype,
        arch=arch,
        types=_pointers(floats | integers)
        | dict.fromkeys([*strides, "kv_heads"], "i32")
        | {"scale_log2": "fp32"},
        aligned=frozenset(strides),
        constants={
            "GROUP": query_heads // kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_D": padded_head_dim(head_dim),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "INPUT_PRECISION": dot_precision(arch, head_dim),
            "HAS_SPLITS": True,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        programs=int(traffic["tiles"]) * kv_heads,
        matrix=True,
        flops=traffic["flops"],
        least_bytes=traffic["least_bytes"],
        bytes=traffic["query_bytes"] + traffic["requested"],
        hbm_bytes=traffic["query_bytes"] + traffic["hbm"],
        reason=config.reason,
        counts=traffic,
    )


def merge_case(arch: str, dtype: str, query_heads: int, kv_heads: int, head_dim: int) -> Case:
    """The merge of 4 parts of each of 32 split tiles."""
    config = attention_config(arch, head_dim, DTYPES[dtype])
    tiles, parts = 32, 4
    outputs = tiles * kv_heads * config.block_m * head_dim
    moved = outputs * (parts * 4.0 + DTYPES[dtype].itemsize) + 4.0 * outputs / head_dim * parts
    return Case(
        op="prefix_attention",
        kernel="_merge_splits_kernel",
        shape="32 tiles in 4 parts",
        dtype=dtype,
        arch=arch,
        types=_pointers(
            {"out": f"*{dtype}", "partial": "*fp32", "partial_lse": "*fp32", "slot_row": "*i32"}
        )
        | dict.fromkeys(("stride_ot", "stride_oh", "kv_heads", "slots"), "i32"),
        aligned=frozenset({"stride_ot", "stride_oh"}),
        constants={
            "GROUP": query_heads // kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_D": padded_head_dim(head_dim),
            "BLOCK_M": config.block_m,
            "MERGE_M": 16,
        },
        num_warps=4,
        num_stages=1,
        programs=tiles * parts * kv_heads * config.block_m // 16,
        matrix=False,
        flops=4.0 * outputs * parts,
        least_bytes=moved,
        bytes=moved,
        hbm_bytes=moved,
        reason="16 rows: few registers, many programs",
    )


def head_cases(arch: str, dtype: str, name: str, hidden: int, vocab: int) -> list[Case]:
    """The verdict head's three kernels at the standard forest's read rows, 4 label rows in 2
    labels."""
    rows, label_rows, labels = ForestShape().read_rows, 4, 2
    itemsize = DTYPES[dtype].itemsize
    config = vocab_config(arch, rows, DTYPES[dtype])
    parts = math.ceil(vocab / VOCAB_PART)
    least = itemsize * hidden * (rows + 1 + label_rows) + 4.0 * rows * labels
    label = Case(
        op="verdict_head",
        kernel="_label_kernel",
        shape=name,
        dtype=dtype,
        arch=arch,
        types=_pointers(
            {
                "label_logits": "*fp32",
                "normed": f"*{dtype}",
                "hidden": f"*{dtype}",
                "weight": f"*{dtype}",
                "label_rows": f"*{dtype}",
            }
        )
        | {"label_ptr_ptr": "*i32", "eps": "fp32"}
        | dict.fromkeys(
            ("stride_hn", "stride_lr", "hidden_size", "label_count", "rows_of_labels"), "i32"
        ),
        aligned=frozenset({"stride_hn", "stride_lr", "hidden_size"}),
        constants={
            "UNIT_OFFSET": False,
            "WRITE_NORMED": True,
            "BLOCK_R": 4,
            "BLOCK_H": LABEL_BLOCK_H,
        },
        num_warps=LABEL_WARPS,
        num_stages=3,
        programs=rows,
        matrix=False,
        flops=2.0 * rows * hidden * (label_rows + 2),
        least_bytes=least + itemsize * rows * hidden,
        bytes=itemsize * rows * hidden * (3.0 + 2 + label_rows) + 4.0 * rows * labels,
        hbm_bytes=least + itemsize * rows * hidden,
        reason="one row a program; the label rows and the weight stay in L2",
    )
    once = itemsize * hidden * (rows + vocab) + 8.0 * rows * parts
    row_tiles = math.ceil(rows / config.block_n)
    tokens_of_tiles = parts * VOCAB_PART / config.block_v
    vocabulary = Case(
        op="verdict_head",
        kernel="_vocab_kernel",
        shape=name,
        dtype=dtype,
        arch=arch,
        types=_pointers(
            {
                "part_max": "*fp32",
                "part_sum": "*fp32",
                "normed": f"*{dtype}",
                "vocab": f"*{dtype}",
            }
        )
        | dict.fromkeys(("stride_vv", "rows", "vocab", "hidden_size"), "i32"),
        aligned=frozenset({"stride_vv", "rows", "vocab", "hidden_size"}),
        constants={
            "BLOCK_N": config.block_n,
            "BLOCK_V": config.block_v,
            "BLOCK_H": config.block_h,
            "PART": VOCAB_PART,
            "INPUT_PRECISION": dot_precision(arch),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        programs=row_tiles * parts,
        matrix=True,
        flops=2.0 * rows * hidden * vocab,
        least_bytes=itemsize * hidden * (rows + vocab) + 4.0 * rows,
        bytes=itemsize * hidden * (vocab * row_tiles + rows * tokens_of_tiles) + 8.0 * rows * parts,
        hbm_bytes=once,
        reason=config.reason,
    )
    merge_bytes = 8.0 * rows * parts + 4.0 * rows
    merge = Case(
        op="verdict_head",
        kernel="_vocab_merge_kernel",
        shape=name,
        dtype=dtype,
        arch=arch,
        types=_pointers({"vocab_lse": "*fp32", "part_max": "*fp32", "part_sum": "*fp32"})
        | {"rows": "i32", "parts": "i32"},
        aligned=frozenset({"rows"}),
        constants={"BLOCK_S": 128},
        num_warps=1,
        num_stages=3,
        programs=rows,
        matrix=False,
        flops=6.0 * rows * parts,
        least_bytes=merge_bytes,
        bytes=merge_bytes,
        hbm_bytes=merge_bytes,
        reason="two numbers a part: one warp a row",
    )
    return [label, vocabulary, merge]


def latent_cases(arch: str, dtype: str, name: str, elements: int) -> list[Case]:
    """`sde_step` with given and drawn noise, and `rpo_loss` with a latent-mean KL: B = 16, x and v
    in `dtype`."""
    config = elementwise_config(arch)
    itemsize = DTYPES[dtype].itemsize
    numbers = SAMPLES * elements
    blocks = math.ceil(elements / config.block)
    programs = SAMPLES * blocks

    def case(
        op: str,
        kernel: str,
        detail: str,
        pointers: dict[str, str],
        integers: tuple[str, ...],
        constants: dict[str, int | str | bool],
        *,
        streams: int,
        scalars: int,
        operations: int,
        finalise: float = 0.0,
    ) -> Case:
        return Case(
            op=op,
            kernel=kernel,
            shape=f"{name}{detail}",
            dtype=dtype,
            arch=arch,
            types=_pointers(pointers) | dict.fromkeys(integers, "i32"),
            aligned=frozenset(integers),
            constants=constants | {"BLOCK_E": config.block},
            num_warps=config.num_warps,
            num_stages=3,
            programs=programs,
            matrix=False,
            flops=float(operations * numbers),
            least_bytes=float(streams * itemsize * numbers),
            bytes=float(streams * itemsize * numbers + scalars * programs),
            hbm_bytes=float(streams * itemsize * numbers + scalars * programs),
            reason=config.reason,
            counts={"finalise_bytes": finalise},
        )

    step = dict.fromkeys(("x_next", "x", "v", "noise"), f"*{dtype}")
    step |= {"partial": "*fp32", "seed": "*i64"}
    step |= dict.fromkeys(("x_scale", "v_scale", "std"), "*fp32")
    step_integers = ("stride_xb", "stride_vb", "stride_nb", "elements")
    loss = dict.fromkeys(("v", "x", "x_next", "v_ref", "v_old"), f"*{dtype}")
    loss |= dict.fromkeys(("x_scale", "v_scale"), "*fp32")
    loss_integers = (
        "stride_vb",
        "stride_xb",
        "stride_xnb",
        "stride_refb",
        "stride_oldb",
        "elements",
    )
    forward: dict[str, int | str | bool] = {"KL": 1, "HAS_REF": True, "HAS_OLD": False}
    backward: dict[str, int | str | bool] = {"HAS_REF": True, "HAS_OLD": False}
    log_prob = _finalise_case(arch, dtype, name, "sde_step", "_log_prob_kernel", blocks, sums=1)
    sums = _finalise_case(arch, dtype, name, "rpo_loss", "_rpo_loss_kernel", blocks, sums=2)
    # Scalars: bytes of the numbers that a program loads and of the sums that it stores.
    return [
        case(
            "sde_step",
            "_sde_step_kernel",
            "",
            step,
            step_integers,
            {"NOISE": 1},
            streams=4,
            scalars=16,
            operations=8,
            finalise=log_prob.bytes,
        ),
        case(
            "sde_step",
            "_sde_step_kernel",
            " drawn noise",
            step,
            step_integers,
            {"NOISE": 2},
            streams=3,
            scalars=24,
            operations=20,
            finalise=log_prob.bytes,
        ),
        case(
            "rpo_loss",
            "_rpo_sums_kernel",
            " forward",
            {"partial": "*fp32", **loss},
            loss_integers,
            forward,
            streams=4,
            scalars=16,
            operations=9,
            finalise=sums.bytes,
        ),
        case(
            "rpo_loss",
            "_rpo_backward_kernel",
            " backward",
            {"grad_v": f"*{dtype}", "grad_loss": "*fp32", "stats": "*fp32", **loss},
            loss_integers,
            backward,
            streams=5,
            scalars=20,
            operations=8,
        ),
        log_prob,
        sums,
    ]


def _finalise_case(
    arch: str, dtype: str, name: str, op: str, kernel: str, blocks: int, *, sums: int
) -> Case:
    """The kernels that add the blocks' partial sums, one program a sample."""
    constants: dict[str, int | str | bool] = {"NORMALISED": True, "BLOCK_P": 128}
    names = ["partial", "std"]
    types = {"elements": "i32", "blocks": "i32"}
    if kernel == "_rpo_loss_kernel":
        constants |= {"KL": 1, "HAS_REF": True, "HAS_OLD": False}
        names += ["loss", "stats", "v_scale", "dt", "log_prob_old", "advantage"]
        types |= dict.fromkeys(("clip_low", "clip_high", "beta"), "fp32")
    else:
        names.append("log_prob")
    moved = 4.0 * SAMPLES * (sums * blocks + (12 if kernel == "_rpo_loss_kernel" else 2))
    return Case(
        op=op,
        kernel=kernel,
        shape=f"{name} finalise",
        dtype=dtype,
        arch=arch,
        types=_pointers(dict.fromkeys(names, "*fp32")) | types,
        aligned=frozenset({"elements", "blocks"}),
        constants=constants,
        num_warps=1,
        num_stages=3,
        programs=SAMPLES,
        matrix=False,
        flops=float(sums * SAMPLES * blocks),
        least_bytes=moved,
        bytes=moved,
        hbm_bytes=moved,
        reason="a few hundred partial sums: one warp a sample, a fixed order",
    )


def _pointers(types: dict[str, str]) -> dict[str, str]:
    return {f"{name}_ptr": kind for name, kind in types.items()}
