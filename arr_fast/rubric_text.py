"""The reference's rubric text: numbered themes, each with numbered tips."""

from __future__ import annotations

import re
from collections.abc import Sequence

from arr_fast.errors import RubricError

# Possessive throughout: neighbours that both match a star or a space would be tried in every split.
_LEAD = r"[-*#>\s]*+"
_NUMBER = r"(?:\(?+\d++[.):]\s*+)?+"
_RUBRIC = r"(?:\**+Rubric\s*+\d*+\**+\s*+[:.]\s*+)?+"
_BODY = r":\**+\s*+(?P<body>.*)$"
_THEME = re.compile(rf"^{_LEAD}{_NUMBER}{_RUBRIC}\**+Theme\**+\s*+\d*+\s*+{_BODY}", re.IGNORECASE)
_TIP = re.compile(rf"^{_LEAD}\**+Tip\s*+\d*+\**+\s*+{_BODY}", re.IGNORECASE)
_ITEM = re.compile(r"^\s*\(?\d+[.)]\s+(?P<body>\S.*)$")


def parse_themes(text: str) -> list[tuple[str, list[str]]]:
    """Reads theme text, or, where no line says "Theme:", a plain numbered list.

    Args:
        text: The text. An unmarked line continues the theme or tip before it.

    Returns:
        (theme, tips) in order; the items of a plain list have no tips.

    Raises:
        RubricError: for an empty text, a tip or unmarked line before the first theme, or a theme or
            tip without words; the message gives the line number.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [(number, line) for number, line in lines if line]
    has_themes = any(_THEME.match(line) for _, line in lines)
    opening = _THEME if has_themes else _ITEM
    blocks: list[tuple[str, list[str]]] = []
    for number, line in lines:
        head, tip = opening.match(line), _TIP.match(line) if has_themes else None
        if head is not None:
            blocks.append((_words(head["body"], number, "theme"), []))
        elif not blocks:
            found = line[:60]
            raise RubricError(f"line {number}: expected 'Theme: ...' or '1. ...', got {found!r}")
        elif tip is not None:
            blocks[-1][1].append(_words(tip["body"], number, "tip"))
        else:
            theme, tips = blocks[-1]
            if tips:
                tips[-1] = f"{tips[-1]} {_one_line(line)}"
            else:
                blocks[-1] = (f"{theme} {_one_line(line)}", tips)
    if not blocks:
        raise RubricError("the text holds no criteria, expected 'Theme: ...' lines")
    return blocks


def render_themes(blocks: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Writes numbered theme text; line breaks within a theme or tip become spaces."""
    parts = []
    for index, (theme, tips) in enumerate(blocks, start=1):
        lines = [f"{index}. Theme: {_one_line(theme)}"]
        lines += [f"- Tip {place}: {_one_line(tip)}" for place, tip in enumerate(tips, start=1)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def slugs(texts: Sequence[str]) -> list[str]:
    """Returns short unique ids made of the first words of each text."""
    seen: dict[str, int] = {}
    result = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())[:6]
        base = "_".join(words)[:60] or "criterion"
        if base == "holistic":
            base = "holistic_impression"
        slug = base
        while slug in seen:
            seen[base] += 1
            slug = f"{base}_{seen[base]}"
        seen[slug] = 1
        result.append(slug)
    return result


def _words(body: str, number: int, kind: str) -> str:
    body = _one_line(body).strip("*").strip()
    if not body:
        raise RubricError(f"line {number}: the {kind} has no words")
    return body


def _one_line(text: str) -> str:
    return " ".join(text.split())
