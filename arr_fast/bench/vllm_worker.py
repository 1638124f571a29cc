"""Runs inside vLLM's own interpreter; speaks JSON lines, answers begin with "@".

Not imported by the package. Usage: python vllm_worker.py MODEL_DIR THREADS
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    """Loads the model, then serves load, reset and run until standard input ends."""
    model, threads = sys.argv[1], sys.argv[2]
    os.environ["OMP_NUM_THREADS"] = threads
    import torch
    from PIL import Image
    from vllm import LLM

    torch.set_num_threads(int(threads))
    llm = LLM(
        model,
        runner="pooling",
        convert="classify",
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=4096,
        limit_mm_per_prompt={"image": 2},
        # Listed as [false, true]: the score is P("1").
        hf_overrides={"classifier_from_token": ["2", "1"], "method": "from_2_way_softmax"},
    )
    _say({"ready": True})
    prompts: list[dict[str, Any]] = []
    for line in sys.stdin:
        message = json.loads(line)
        if message["do"] == "load":
            opened: dict[str, Any] = {}
            for request in message["requests"]:
                for path in request["images"]:
                    if path not in opened:
                        opened[path] = Image.open(path).convert("RGB")
            prompts = [
                {
                    "prompt_token_ids": request["ids"],
                    "multi_modal_data": {"image": [opened[path] for path in request["images"]]},
                }
                for request in message["requests"]
            ]
            _say({})
        elif message["do"] == "reset":
            llm.reset_prefix_cache()
            if message["images"]:
                llm.reset_mm_cache()
                for name in ("reset_encoder_cache",):
                    if hasattr(llm.llm_engine, name):
                        getattr(llm.llm_engine, name)()
            _say({})
        else:
            outputs = llm.classify(prompts, use_tqdm=False)
            _say({"probabilities": [float(o.outputs.probs[-1]) for o in outputs]})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write("@" + json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
