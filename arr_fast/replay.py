"""The independent oracle: one verdict recomputed by a plain transformers forward.

Of a trace it reads the token ids, the images and the label ids, and nothing else. Pixels come from
the checkpoint's own image processor; positions, image features and full logits from transformers.
It shares no code with the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from arr_fast.images import CanonicalImage
    from arr_fast.trace import VerdictTrace

_GRID_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
_SQUARE_FAMILIES = ("smolvlm", "idefics3")


class Replayer:
    """Replays verdicts with an unmodified transformers model, one full sequence at a time.

    Args:
        model: An image-text-to-text model in evaluation mode.
        image_processor: The checkpoint's image processor.
    """

    def __init__(self, model: Any, image_processor: Any) -> None:
        self.model = model
        self.image_processor = image_processor
        self.config = model.config
        self._image_token = int(self.config.image_token_id)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        adapter: str | PathLike[str] | None = None,
        attn_implementation: str = "sdpa",
    ) -> Replayer:
        """Loads a checkpoint with transformers alone.

        Args:
            path: A directory or hub id.
            dtype: Compute type; float32 for exactness checks.
            device: Where to run.
            revision: Hub revision.
            adapter: A PEFT adapter directory; it is applied, not merged.
            attn_implementation: "sdpa" or "eager".
        """
        from transformers import AutoImageProcessor, AutoModelForImageTextToText

        # The grouped expert product has no float64 form.
        extra = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path, revision=revision, dtype=dtype, attn_implementation=attn_implementation, **extra
        )
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter))
        processor = AutoImageProcessor.from_pretrained(path, revision=revision, backend="pil")
        return cls(model.to(device).eval(), processor)

    def log_odds(self, trace: VerdictTrace) -> float:
        """The verdict of a trace, recomputed.

        Args:
            trace: Its input_ids, images and label_ids are read; positions and log_odds are not.

        Returns:
            logsumexp(first label's logits) - logsumexp(second label's logits), in float64 from
            the logits as the model returns them.
        """
        logits = self.logits(trace.input_ids, trace.images).double()
        first, second = (
            torch.logsumexp(logits[list(variants)], dim=0) for variants in trace.label_ids
        )
        return float(first - second)

    def logits(self, input_ids: np.ndarray, images: Sequence[CanonicalImage]) -> torch.Tensor:
        """Full-vocabulary logits [V] after the last token, in the model's dtype.

        Args:
            input_ids: int64 [T], image placeholders expanded.
            images: The images in order of appearance.
        """
        with torch.inference_mode():
            output = self.model(
                **self.model_inputs(input_ids, images), logits_to_keep=1, use_cache=False
            )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def label_mass(self, trace: VerdictTrace) -> float:
        """P(any label) over the whole vocabulary, in float64."""
        log_probs = self.logits(trace.input_ids, trace.images).double().log_softmax(dim=0)
        ids = [token for variants in trace.label_ids for token in variants]
        return float(log_probs[ids].exp().sum())

    def router_gaps(self, trace: VerdictTrace) -> float:
        """How close a mixture of experts came to another choice of experts.

        Args:
            trace: A verdict of a mixture-of-experts model.

        Returns:
            The smallest gap between the k-th and (k+1)-th router logit over layers and tokens
            (in the last layer the last token alone, as no other is read); inf without a router.
            Under about 1e-5 float32 rounding may pick another expert.
        """
        with self._router_logits() as layers:
            self.logits(trace.input_ids, trace.images)
        smallest = float("inf")
        for number, (router_logits, top_k) in enumerate(layers):
            rows = router_logits[-1:] if number == len(layers) - 1 else router_logits
            ordered = rows.double().sort(dim=-1, descending=True).values
            smallest = min(smallest, float((ordered[:, top_k - 1] - ordered[:, top_k]).min()))
        return smallest

    def model_inputs(
        self, input_ids: np.ndarray, images: Sequence[CanonicalImage]
    ) -> dict[str, torch.Tensor]:
        """Everything that the model's forward needs for one sequence, on the model's device.

        Args:
            input_ids: int64 [T], image placeholders expanded.
            images: The images in order of appearance.
        """
        ids = torch.as_tensor(np.asarray(input_ids, dtype=np.int64))[None]
        inputs: dict[str, torch.Tensor] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        if images:
            inputs |= self._pixels(ids, [image.to_pil() for image in images])
        device = self.model.device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _pixels(self, ids: torch.Tensor, images: list[Any]) -> dict[str, torch.Tensor]:
        kind = self.config.model_type
        if kind in _GRID_FAMILIES:
            batch = self.image_processor(images=images, return_tensors="pt")
            is_image = (ids == self._image_token).int()
            return {
                "pixel_values": batch["pixel_values"],
                "image_grid_thw": batch["image_grid_thw"],
                "mm_token_type_ids": is_image,
            }
        if kind in _SQUARE_FAMILIES:
            batch = self.image_processor(
                images=[images], do_image_splitting=False, return_tensors="pt"
            )
            names = ("pixel_values", "pixel_attention_mask")
            return {name: batch[name] for name in names}
        if kind == "llava_onevision":
            return self._base_resolution(images)
        raise ValueError(
            f"cannot replay model type {kind!r}; there are "
            f"{', '.join((*_GRID_FAMILIES, *_SQUARE_FAMILIES, 'llava_onevision'))}"
        )

    def _base_resolution(self, images: list[Any]) -> dict[str, torch.Tensor]:
        # LLaVA-OneVision tiles an image only if it is alone in its prompt. A judge sees every
        # image at base resolution, so a lone image is shown as one of a pair of itself.
        count = len(images)
        shown = images if count > 1 else images * 2
        batch = self.image_processor(images=[shown], return_tensors="pt")
        return {
            "pixel_values": batch["pixel_values"][:count],
            "image_sizes": torch.as_tensor(np.asarray(batch["image_sizes"]))[:count],
            "batch_num_images": torch.tensor([len(shown)]),
        }

    @contextmanager
    def _router_logits(self) -> Iterator[list[tuple[torch.Tensor, int]]]:
        layers: list[tuple[torch.Tensor, int]] = []

        def record(module: Any, _args: Any, output: Any) -> None:
            layers.append((output[0].detach(), int(module.top_k)))

        routers = [m for m in self.model.modules() if type(m).__name__.endswith("TopKRouter")]
        handles = [router.register_forward_hook(record) for router in routers]
        try:
            yield layers
        finally:
            for handle in handles:
                handle.remove()
