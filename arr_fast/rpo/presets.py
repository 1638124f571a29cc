"""What a preset sets; the defaults of the classes in `config` are `recommended`.

`recommended` trains the first four of eight steps, which decide what is drawn, and weighs them
alike (guard). Unweighted, a step's gradient goes with |d mu / d v| / S, which is 12 times as large
at the seventh step as at the first; times S / -dt, as GRPO-Guard has it, all are within a quarter.
`paper` is arXiv 2605.08354 with its reference code.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "paper": {
        "sampler": {
            "kind": "dance_sde",
            "eta": 0.3,
            "steps": 8,
            "shift": 3.0,
            "floor_timesteps": True,
            "trained": 7,
            "window": 7,
        },
        "loss": {
            "clip": 0.2,
            "clip_nats": None,
            "beta": 0.01,
            "kl": "log_prob_diff",
            "guard": False,
            "centred": False,
        },
        "rollout": {"pairs": 32},
        "optimiser": {"lr": 5e-5, "grad_clip": 1.0},
    },
}


def demo_path(*, edit: bool = False) -> Path:
    """The configuration of `arr-fast train --demo`, with or without --edit."""
    name = "demo_shapes_edit.yaml" if edit else "demo_shapes.yaml"
    return Path(str(resources.files("arr_fast.rpo") / "configs" / name))
