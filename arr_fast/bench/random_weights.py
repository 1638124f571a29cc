"""Weights of the random checkpoints, scaled so that verdicts move with the input.

transformers' own initialisation (standard deviation 0.02) gives log-odds that hardly depend on the
prompt, so that a wrong mask would pass every tolerance. Here every matrix keeps the variance of
its input, attention is peaked, every norm and bias differs from its neutral value, and the final
norm is scaled until log-odds have the asked standard deviation over random prompts, around zero.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

_PREFIXES = 4
_CRITERIA = 16
_CRITERION_TOKENS = 8


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
            parameter.copy_(_scaled(name, values, model))
        model.tie_weights()


def _scaled(name: str, values: torch.Tensor, model: Any) -> torch.Tensor:
    is_norm = "norm" in name.lower().rsplit(".", 2)[-2] or ".ln_q." in name
    if "q_norm" in name or "k_norm" in name:
        return 1.5 + 0.15 * values
    if values.dim() == 1:
        if name.endswith("weight") and is_norm:
            return 1.0 + 0.15 * values
        return 0.15 * values
    if "embed_tokens" in name or "pos_embed" in name or "position_embedding" in name:
        return 0.7 * values
    # Matrices act on their last dimension (experts are stacked in front); convolutions are flat.
    fan_in = values[0].numel() if values.dim() > 3 else values.shape[-1]
    if "patch_embed" in name:
        fan_in = values[0].numel()
    gain = 1.0
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        gain = 1.5
    elif name.endswith(".gate.weight"):
        gain = 2.0
    return values * (gain / fan_in**0.5)


def calibrate(
    model: Any, tokenizer: Any, *, prefix_tokens: int, target: float, seed: int
) -> float:
    """Centres the label rows and scales the final norm: log-odds spread by `target` around zero.

    Random criteria are read after random prefixes that look like a prompt (text, then image
    features, here Gaussian). The spread is taken over the criteria of one prefix. Both label pairs
    ("1"/"2" and "Yes"/"No") reach the target: the smaller one counts.

    Args:
        model: The model after `randomise`.
        tokenizer: Its tokenizer.
        prefix_tokens: Length of the prefixes; a long prefix dilutes what a criterion says.
        target: Standard deviation of the log-odds, in nats.
        seed: Seed of the prompts.

    Returns:
        The factor that was applied.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embed = model.get_input_embeddings()
    plain = len(tokenizer) - len(tokenizer.get_added_vocab())
    tail = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False
    ).rpartition("x")[2]
    tail_ids = tokenizer(tail, add_special_tokens=False, return_tensors="pt").input_ids
    words = torch.randint(
        0, plain, (_PREFIXES * _CRITERIA, _CRITERION_TOKENS), generator=generator
    )
    leaves = torch.cat([words, tail_ids.expand(len(words), -1)], dim=1)
    text = torch.randint(0, plain, (_PREFIXES, prefix_tokens // 8), generator=generator)
    features = torch.randn(
        _PREFIXES, prefix_tokens - text.shape[1], head.weight.shape[1], generator=generator
    )
    pairs = [[tokenizer.vocab[label] for label in pair] for pair in (("1", "2"), ("Yes", "No"))]
    with torch.no_grad():
        prefix = torch.cat([embed(text), features * embed.weight.std()], dim=1)
        cache = decoder(inputs_embeds=prefix, use_cache=True).past_key_values
        cache.batch_repeat_interleave(_CRITERIA)
        hidden = decoder(inputs_embeds=embed(leaves), past_key_values=cache, use_cache=True)
        read = hidden.last_hidden_state[:, -1].double()
        centre = read.mean(dim=0)
        spread = []
        for first, second in pairs:
            difference = (head.weight[first] - head.weight[second]).double()
            shift = ((difference @ centre) / (centre @ centre) * centre / 2).float()
            # Rounded, as the factor below: no weight depends on the order in which threads add.
            shift = (shift * 4096).round() / 4096
            head.weight[first] -= shift
            head.weight[second] += shift
            difference = (head.weight[first] - head.weight[second]).double()
            log_odds = (read @ difference).view(_PREFIXES, _CRITERIA)
            spread.append(float(log_odds.std(dim=1).mean()))
        factor = float(f"{target / min(spread):.3g}")
        decoder.norm.weight.mul_(factor)
    return factor
