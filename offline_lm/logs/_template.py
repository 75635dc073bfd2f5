"""Text that a chat template made, back to messages: ChatML (Qwen, and most others) and Llama 3."""

from __future__ import annotations

import re
from typing import Any

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n?")
_LLAMA3 = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n{0,2}")
_TEMPLATES = ((_CHATML, "<|im_end|>"), (_LLAMA3, "<|eot_id|>"))


def messages(text: str) -> list[dict[str, Any]] | None:
    """The messages of a rendered conversation; None if it has no markers of a known template.

    A message that ends without its marker (cut, or not yet written) is kept; an empty one at the end is the prompt
    for a generation, and is not.
    """
    for begin, end in _TEMPLATES:
        found = list(begin.finditer(text))
        if not found:
            continue
        starts = [match.start() for match in found[1:]] + [len(text)]
        turns = [
            {"role": match[1], "content": text[match.end() : stop].partition(end)[0].rstrip("\n")}
            for match, stop in zip(found, starts, strict=True)
        ]
        return turns if turns[-1]["content"] else turns[:-1]
    return None
