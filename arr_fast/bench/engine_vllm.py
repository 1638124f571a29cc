"""`vllm`: a pooling `classify` head over two rows, in an interpreter of its own.

vLLM pins its own torch, so it lives in a separate environment. A worker process is started once and
asked for one run at a time over a pipe; the runner thus alternates processes. The worker folds
lm_head["1"] - lm_head["2"] into a one-row head (`from_2_way_softmax`), with block_size 32 so that
little of the prefix is computed again for each criterion.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from arr_fast.bench.engines import EngineOptions
from arr_fast.bench.plain_prompts import PlainPrompts
from arr_fast.bench.workloads import Inputs
from arr_fast.errors import MissingDependencyError

_WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmEngine:
    """K requests per leg in one `classify` call; prefix caching on, reset before every run."""

    name = "vllm"
    gated = True
    note = (
        "own interpreter; classify with the two-row head, block_size 32, prefix cache reset "
        "before every run, encoder cache kept where images are warm; gated on probabilities"
    )

    def __init__(self, options: EngineOptions) -> None:
        python = options.vllm_python
        if not python or not Path(python).exists():
            raise MissingDependencyError(
                f"an interpreter with vLLM (given: {python or 'none'}; pass --vllm-python)"
            )
        self._python = python
        self._threads = options.threads
        self._folder = tempfile.TemporaryDirectory(prefix="arr-fast-vllm-")
        self._process: subprocess.Popen[str] | None = None

    def prepare(self, model_dir: str) -> None:
        """Starts the worker and waits until the model is loaded."""
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        self.prompts = PlainPrompts(
            AutoTokenizer.from_pretrained(model_dir),
            AutoConfig.from_pretrained(model_dir),
            AutoImageProcessor.from_pretrained(model_dir, backend="pil"),
        )
        log = Path(self._folder.name) / "worker.log"
        self._process = subprocess.Popen(
            [self._python, str(_WORKER), model_dir, str(self._threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self._answer()

    def reset(self, inputs: Inputs, *, warm: bool) -> None:
        """Resets the prefix cache; with cold images the processor and encoder caches too."""
        self._load(inputs)
        self._ask({"do": "reset", "images": not warm})
        if warm:
            self._ask({"do": "run"})
            self._ask({"do": "reset", "images": False})

    def run(self, inputs: Inputs) -> np.ndarray:
        """float64 [items, legs, K], log-odds from the probability of "1"."""
        workload = inputs.workload
        probabilities = np.array(self._ask({"do": "run"})["probabilities"], dtype=np.float64)
        bounded = probabilities.clip(1e-12, 1 - 1e-12)
        odds: np.ndarray = np.log(bounded) - np.log1p(-bounded)
        return odds.reshape(workload.n_pairs, len(workload.legs), workload.criteria)

    def close(self) -> None:
        """Ends the worker."""
        if self._process is not None and self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=60)
        self._folder.cleanup()

    def _load(self, inputs: Inputs) -> None:
        folder = Path(self._folder.name)
        files = []
        for item, images in enumerate(inputs.images):
            for number, image in enumerate(images):
                path = folder / f"{item}-{number}.png"
                image.to_pil().save(path)
                files.append(path)
        requests = []
        group = inputs.workload.group
        for item in range(inputs.workload.n_pairs):
            for leg in inputs.workload.legs:
                names = [str(files[item * group + index]) for index in leg]
                for ids in inputs.sequences(self.prompts, item, leg):
                    requests.append({"ids": _collapsed(ids, self._image_id), "images": names})
        self._ask({"do": "load", "requests": requests})

    @property
    def _image_id(self) -> int:
        return int(self.prompts.config.image_token_id)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None:
            raise RuntimeError("prepare() was not called")
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                reply: dict[str, Any] = json.loads(line[1:])
                return reply
        log = (Path(self._folder.name) / "worker.log").read_text()
        raise RuntimeError(f"the vLLM worker ended: {log[-3000:]}")


def _collapsed(ids: np.ndarray, image_id: int) -> list[int]:
    """One placeholder per image: vLLM expands them itself."""
    repeated = np.concatenate([[False], (ids[1:] == image_id) & (ids[:-1] == image_id)])
    return [int(token) for token in ids[~repeated]]
