"""A judge in the ARR reference's style: it decodes JSON that ranks two images, per criterion.

A cost baseline only. Random weights write no JSON, so nothing is parsed and nothing is compared:
the engine always decodes the number of tokens that one short answer takes.
"""

from __future__ import annotations

import numpy as np
import torch

from arr_fast.bench.engine_transformers import PlainEngine
from arr_fast.bench.workloads import Inputs, Leg

# {"reason": "<about ten words>", "rank": [1, 2]} under a subword tokenizer.
ANSWER_TOKENS = 32


class JsonDecodingEngine(PlainEngine):
    """Greedy decoding of a fixed number of tokens per criterion, batch 1, KV cache on."""

    name = "json-decoding"
    gated = False
    note = (
        f"cost only: {ANSWER_TOKENS} greedy tokens per criterion, batch 1; "
        "random weights give no JSON, so there is no agreement to gate"
    )

    def _leg(self, inputs: Inputs, item: int, leg: Leg) -> list[float]:
        shown = [inputs.images[item][index] for index in leg]
        extra = self._model_inputs(shown)
        for ids in inputs.sequences(self.prompts, item, leg):
            output = self._forward(ids[None], extra, use_cache=True)
            for _ in range(ANSWER_TOKENS - 1):
                chosen = output.logits[:, -1].argmax(dim=-1, keepdim=True)
                output = self.model(
                    input_ids=chosen,
                    past_key_values=output.past_key_values,
                    use_cache=True,
                    logits_to_keep=1,
                )
            torch.argmax(output.logits[:, -1], dim=-1)
        return [float(np.nan)] * inputs.workload.criteria
