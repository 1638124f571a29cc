"""The prompts by which the bundled judge was taught to write criteria."""

from __future__ import annotations

from collections.abc import Sequence

from arr_fast import prompts


def caption_prompt(caption: str) -> list[prompts.Part]:
    """Asks for the criteria of a caption alone; no image is shown."""
    return [f"Write criteria for this caption.\nCaption: {caption}"]


def pair_prompt(
    task: prompts.Task,
    caption: str,
    preferred: int,
    general: bool,
    rejected: Sequence[str] = (),
) -> list[prompts.Part]:
    """Asks why one image of a pair is preferred.

    Args:
        task: Text-to-image or editing.
        caption: Caption or instruction.
        preferred: 1 or 2, in order of appearance.
        general: General criteria, or ones that name what this caption is about.
        rejected: Criteria that failed verification.
    """
    text = f"\nPreferred: Image {preferred}"
    if rejected:
        text += "\nNot these:" + "".join(f"\n{i}. {r}" for i, r in enumerate(rejected, 1))
    kind = "general" if general else "specific"
    return [*prompts.pair_parts(task, caption), f"{text}\nWrite {kind} criteria."]
