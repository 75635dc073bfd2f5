"""First weights that read: attention heads that begin with a purpose, to be trained on like any other.

To judge an action a critic compares words of goal, page and action across a page, which takes heads that find a word
again, know what stood before it, and know whether it stands in the page, the goal or the action. Random weights find
such circuits after tens of millions of tokens, if at all; these begin with them. The idea of first weights that imitate
trained ones is Trockman & Kolter's (2023); the circuits are those of Olsson et al. (2022, induction heads).

With rotary positions the score of a head with biases on its query and key is a sum of cosines of the distance, which
can be made to peak at a distance; queries and keys that share an orthonormal projection score equal tokens highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SINK, _MARK = 0, 1
"""Dimensions of the embedding that tell the first token of all, and the words that open a part of a prompt."""

_GAIN = 1.9
"""Of projections that compare tokens: equal ones then hold their own among some hundred others."""

_LAYERS = (
    ("same", "region", "before", "recent", "second before"),
    ("follows", "same pair", "recent", "before", "same pair"),
    ("same", "open", "recent", "before", "open"),
    ("open", "open", "recent", "open", "recent"),
)
"""What the heads of a layer begin as, over and over where there are more of them; all later layers are as the last."""


@torch.no_grad()
def start_heads(model: Any, start: int, marks: Sequence[int]) -> None:
    """Set embeddings and attention of a Llama with `attention_bias`, in place.

    - `same`: the same token elsewhere, not here; where there is none, the first token of all.
    - `before`, `second before`, `recent`: what stands one or two tokens back, or in the last ten.
    - `region`: the last word that opened a part, so that a token knows which part it is in.
    - `follows`: what came after the same token elsewhere. `same pair`: the same token after the same token.
    - `open`: queries and keys alike, no more.

    Args:
        start: id of the token that stands first in every prompt.
        marks: ids of the words that open its parts.
    """
    embedding = model.model.embed_tokens.weight
    nn.init.normal_(embedding)  # of size 1, so that the first layers still tell tokens apart
    width = embedding.shape[1]
    embedding[:, [_SINK, _MARK]] = 0.0
    embedding[start] = 0.0
    embedding[start, _SINK] = width**0.5
    embedding[list(marks), _MARK] = 4.0
    model.model.norm.weight.fill_(width**-0.5)  # logits stay of size 1 all the same
    earlier = torch.zeros(0)
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        for h in range(model.config.num_attention_heads):
            names = _LAYERS[min(i, len(_LAYERS) - 1)]
            kind = names[h % len(names)]
            head = _Head(model.config, attention, h)
            head.start(kind, earlier)
            if kind == "before" and not len(earlier):  # the previous token, as the next layer can read it
                earlier = torch.stack([head.read, head.write.T])


class _Head:
    """One attention head's weights, as views."""

    def __init__(self, config: Any, attention: Any, number: int) -> None:
        d = self.size = attention.head_dim
        at = slice(number * d, (number + 1) * d)
        self.width = config.hidden_size
        self.q, self.k = attention.q_proj.weight[at], attention.k_proj.weight[at]
        self.q_bias, self.k_bias = attention.q_proj.bias[at], attention.k_proj.bias[at]
        self.angle = config.rope_parameters["rope_theta"] ** -(torch.arange(0, d, 2) / d)  # of pair (i, i + d/2)
        fast = self.angle >= 0.02  # turns noticeably within the tokens of a line
        self.fast = fast.nonzero()[:, 0].tolist()
        still = (~fast).nonzero()[:, 0]
        self.content = torch.cat([still, still + d // 2])
        self.stillest = int(still[-1])
        self.read, self.write = _orthonormal(d, self.width), _orthonormal(self.width, d)
        attention.v_proj.weight[at] = self.read
        attention.o_proj.weight[:, at] = self.write

    def start(self, kind: str, earlier: Tensor) -> None:
        n = len(self.content)
        if kind in ("follows", "same pair") and not len(earlier):  # fewer than three heads
            kind = "open"
        match kind:
            case "same":
                alike = _orthonormal(n, self.width)
                self._compare(alike, alike, _GAIN)
                self._elsewhere()
            case "same pair":
                pair = torch.cat([_orthonormal(n // 2, self.width), _orthonormal(n - n // 2, self.size) @ earlier[1]])
                self._compare(pair, pair, 1.15 * _GAIN)
                self._elsewhere()
            case "follows":
                mixed = _orthonormal(n, self.size)
                self._compare(mixed @ earlier[0], mixed @ earlier[1], 1.15 * _GAIN)
                self._or_start()
            case "before" | "second before":
                self._open(0.1)
                self._at(1 if kind == "before" else 2, 5.0)
            case "recent":
                self._open(0.3)
                for i in self.fast[len(self.fast) // 2 :]:
                    self.q_bias[i] = self.k_bias[i] = 2.0
            case "region":
                for i in ((self.angle > 0.003) & (self.angle < 0.05)).nonzero()[:, 0].tolist():
                    self.q_bias[i], self.k[i, _MARK] = 6.0, 2.0
            case "open":
                self._open(1.0)

    def _open(self, size: float) -> None:
        rows = _orthonormal(self.size, self.width)
        self.q[:] = size * rows
        self.k[:] = size * rows

    def _compare(self, query: Tensor, key: Tensor, gain: float) -> None:
        """On the pairs that hardly turn, so that it is the same at every distance."""
        self.q[self.content] = gain * query
        self.k[self.content] = gain * key

    def _or_start(self, level: float = 3.4) -> None:
        """The first token of all scores level**2, more than chance resemblance: it is seen where nothing is found."""
        i = self.stillest
        self.q[i] = self.k[i] = 0.0
        self.q_bias[i] = level
        self.k[i, _SINK] = level * (self.size / self.width) ** 0.5

    def _elsewhere(self, amount: float = 2.2) -> None:
        """Not the token itself, nor those beside it."""
        self._or_start()
        for i in self.fast:
            self.q_bias[i], self.k_bias[i] = amount, -amount

    def _at(self, distance: int, amount: float) -> None:
        for i in self.fast:
            turn = self.angle[i] * distance
            self.q_bias[i], self.q_bias[i + self.size // 2] = amount * turn.cos(), -amount * turn.sin()
            self.k_bias[i] = amount


def _orthonormal(rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns))
