"""Weights of the random checkpoints, scaled so that verdicts move with the input.

transformers' own initialisation (standard deviation 0.02) gives log-odds that hardly depend on the
prompt, so that a wrong mask would pass every tolerance. Here every matrix keeps the variance of
its input, attention is peaked, every norm and bias differs from its neutral value, and the final
norm is scaled until log-odds have the asked standard deviation over random prompts, around zero.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from arr_fast.bench.plain_prompts import PlainPrompts
from arr_fast.bench.random_tokenizer import WORDS
from arr_fast.bench.workloads import exact_text, noise_image
from arr_fast.prompts import criterion_leaf, pair_parts, point_parts
from arr_fast.replay import Replayer

_PREFIXES = 4
_CRITERIA = 16
_LEAF_TOKENS = 8
_ROUNDS = 2


def randomise(model: Any, seed: int) -> None:
    """Fills every parameter of a model; each depends on the seed and its own name only.

    Args:
        model: A transformers image-text-to-text model, float32 on the CPU.
        seed: Seed of the whole checkpoint.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(_scaled(name, values))
        model.tie_weights()


def _scaled(name: str, values: torch.Tensor) -> torch.Tensor:
    is_norm = "norm" in name.lower().rsplit(".", 2)[-2] or ".ln_q." in name
    if "q_norm" in name or "k_norm" in name:
        return 1.5 + 0.15 * values
    if values.dim() == 1:
        if name.endswith("weight") and is_norm:
            return 1.0 + 0.15 * values
        return 0.15 * values
    if "embed_tokens" in name or "pos_embed" in name or "position_embedding" in name:
        return 0.5 * values
    # Matrices act on their last dimension (experts are stacked in front); convolutions are flat.
    fan_in = values[0].numel() if values.dim() > 3 else values.shape[-1]
    gain = 1.0
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        gain = 1.5
    elif name.endswith("o_proj.weight"):
        # What the last row reads from others has to outweigh its own embedding.
        gain = 2.0
    elif name.endswith(".gate.weight"):
        gain = 2.0
    return values * float(gain / fan_in**0.5)


def calibrate(
    model: Any, tokenizer: Any, image_processor: Any, *, pixels: int, target: float, seed: int
) -> float:
    """Centres the label rows and scales the final norm: log-odds spread by `target` around zero.

    Pairwise prompts are read for "1"/"2" and pointwise prompts for "Yes"/"No", each with several
    criteria after the same images. The spread is taken over the criteria of one prefix, and the
    smaller of the two label pairs reaches the target.

    Args:
        model: The model after `randomise`.
        tokenizer: Its tokenizer.
        image_processor: Its image processor.
        pixels: Side of the images; a long prefix dilutes what a criterion says.
        target: Standard deviation of the log-odds, in nats.
        seed: Seed of the prompts.

    Returns:
        The factor that was applied.
    """
    rng = np.random.default_rng(seed)
    head, norm = model.get_output_embeddings(), model.get_decoder().norm
    spread = []
    for labels, images in ((("1", "2"), 2), (("Yes", "No"), 1)):
        first, second = (tokenizer.vocab[label] for label in labels)
        with torch.no_grad():
            # With tied embeddings a moved label row changes what is read, so the second round
            # corrects the first.
            for _ in range(_ROUNDS):
                reads = _reads(model, tokenizer, image_processor, images, pixels, rng)
                centre = reads.mean(dim=(0, 1))
                difference = (head.weight[first] - head.weight[second]).double()
                shift = ((difference @ centre) / (centre @ centre) * centre / 2).float()
                # Rounded, as the factor below: no weight depends on the order in which threads add.
                shift = (shift * 4096).round() / 4096
                head.weight[first] -= shift
                head.weight[second] += shift
            difference = (head.weight[first] - head.weight[second]).double()
            spread.append(float((reads @ difference).std(dim=1).mean()))
    factor = float(f"{target / min(spread):.3g}")
    with torch.no_grad():
        norm.weight.mul_(factor)
    return factor


def _reads(
    model: Any,
    tokenizer: Any,
    image_processor: Any,
    images: int,
    pixels: int,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Normed last-row states [prefixes, criteria, hidden], float64, of random prompts."""
    replayer = Replayer(model, image_processor)
    prompts = PlainPrompts(tokenizer, model.config, image_processor)
    captured: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: captured.append(args[0][:, -1].double())
    )
    try:
        with torch.no_grad():
            for _ in range(_PREFIXES):
                shown = [noise_image(rng, pixels, pixels) for _ in range(images)]
                caption = " ".join(rng.choice(WORDS, 10))
                shared = (pair_parts if images == 2 else point_parts)("t2i", caption)
                rows = [prompts.ids([*shared, leaf], shown) for leaf in _leaves(prompts, rng)]
                start = int(np.flatnonzero(np.ptp(np.stack(rows), axis=0))[0])
                inputs = replayer.model_inputs(rows[0][:start], shown)
                cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
                captured.pop()
                cache.batch_repeat_interleave(_CRITERIA)
                leaves = torch.from_numpy(np.stack([row[start:] for row in rows]))
                model(input_ids=leaves, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        handle.remove()
    return torch.stack(captured)


def _leaves(prompts: PlainPrompts, rng: np.random.Generator) -> list[str]:
    texts = [exact_text(prompts, _LEAF_TOKENS, rng, "\nCriterion:") for _ in range(_CRITERIA)]
    return [criterion_leaf(text) for text in texts]
