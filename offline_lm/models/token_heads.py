"""ILQL's heads: V at every position of a response, and Q of every token of the vocabulary there.

They are computed where a response's token is foretold, and nowhere else: a vocabulary is wide.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu

from offline_lm.batches.pack import pack
from offline_lm.batches.tokens import Tokens
from offline_lm.losses.ilql import perturbed_logprobs
from offline_lm.losses.td import ensemble_min
from offline_lm.models import acting, backbone
from offline_lm.models.acting import Chosen

Array = np.ndarray
FILE = "token_heads"


class TokenHeads(nn.Module):
    """V, and an ensemble of Q over the vocabulary: MLPs (width -> hidden -> 1, or vocabulary) on hidden states.

    Args:
        width: size of the hidden states.
        vocabulary: tokens that there are.
        ensemble: Q heads.
        start: what all values are near at first, the logs' mean return.
        unit: what an output of 1 adds to that, the standard deviation of the logs' returns.
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        *,
        ensemble: int = 2,
        hidden: int = 256,
        start: float = 0.0,
        unit: float = 1.0,
    ) -> None:
        super().__init__()
        self.options = dict(ensemble=ensemble, hidden=hidden, start=start, unit=unit)
        self.ensemble, self.start, self.unit = ensemble, start, unit
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        sizes = [1, *[vocabulary] * ensemble]
        self.inner = nn.ModuleList(nn.Linear(width, hidden) for _ in sizes)
        self.outer = nn.ModuleList(nn.Linear(hidden, n) for n in sizes)
        with torch.no_grad():
            for layer in self.outer:
                layer.weight.mul_(0.1)  # pyright: ignore
                layer.bias.zero_()  # pyright: ignore

    def values(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """V, in the reward's unit."""
        (x, *_) = self._inner(hidden, slice(1))
        return self._scaled(self.outer[0](x)[:, 0])

    def q(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "k n vocab"]:
        """Q of every token."""
        found = zip(self.outer[1:], self._inner(hidden, slice(1, None)), strict=True)
        return self._scaled(torch.stack([layer(x) for layer, x in found]))

    def q_of(self, hidden: Float[Tensor, "n d"], taken: Int[Tensor, " n"]) -> Float[Tensor, "k n"]:
        """Q of one token at each position: no product of the vocabulary's size."""
        found = zip(self.outer[1:], self._inner(hidden, slice(1, None)), strict=True)
        of_taken = [(x * layer.weight[taken]).sum(-1) + layer.bias[taken] for layer, x in found]  # pyright: ignore
        return self._scaled(torch.stack(of_taken))

    def _inner(self, hidden: Tensor, which: slice) -> Iterator[Tensor]:
        x = self.norm(hidden.float())
        return (gelu(layer(x)) for layer in self.inner[which])

    def _scaled(self, x: Tensor) -> Tensor:
        return self.start + self.unit * x


@dataclass(frozen=True)
class Readouts:
    """Hidden states of S states and the T tokens of the responses to them.

    Attributes:
        states: [S, d], at the last token of each prompt.
        tokens: [T, d], at the position before each token of the responses; that of a first token is its state's.
        taken: int64 [T], the tokens.
        logits: [T, vocab] of the language model there, or None.
    """

    states: Tensor
    tokens: Tensor
    taken: Tensor
    logits: Tensor | None


def read(
    model: Any, tokens: Tokens, chosen: Chosen, *, logits: bool, autocast: torch.dtype | None = None
) -> Readouts:  # fmt: skip
    """One packed pass; a state of `chosen` may have no responses, and its own readout alone. All in float32."""
    ids, layout = pack(tokens, chosen.states, chosen.responses)
    device = next(model.parameters()).device
    at, taken = acting.foretelling(layout, ids, chosen, acting.lengths(tokens, chosen.branches))
    at, ids = at.to(device), ids.to(device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        if logits:
            out = model(
                input_ids=ids[None], position_ids=layout.positions()[None].to(device), use_cache=False, layout=layout,
                logits_to_keep=at, output_hidden_states=True,
            )  # fmt: skip
            hidden, scores = out.hidden_states[-1][0], out.logits[0].float()
        else:
            hidden, scores = backbone.hidden_states(model, ids, layout), None
    prompt_ends, _ = layout.readouts()
    return Readouts(hidden[prompt_ends.to(device)].float(), hidden[at].float(), taken.to(device), scores)


def response_logprobs(
    model: Any, heads: TokenHeads, tokens: Tokens, chosen: Chosen, *, beta: float, **options: Any
) -> Float[Tensor, " t"]:
    """log pi(token | what stands before it) of ILQL's policy, for every token of the chosen responses."""
    found = read(model, tokens, chosen, logits=True, **options)
    assert found.logits is not None
    # Q in standard deviations of the returns, as in the loss
    scores = perturbed_logprobs(found.logits, ensemble_min(heads.q(found.tokens)), beta=beta / heads.unit)
    return scores.gather(1, found.taken[:, None])[:, 0]


@torch.no_grad()
def estimates(
    model: Any, heads: TokenHeads, tokens: Tokens, *, budget: int, autocast: torch.dtype | None = None
) -> tuple[Array, Array]:
    """V [N] at the end of every prompt, and Q [k, A] of every response: of its last token. Equal ones are read once."""
    model.eval()
    states, responses = acting.distinct(tokens)
    read_at = sorted(set(states.tolist()))
    own: dict[int, list[int]] = {n: [] for n in read_at}
    owner = np.repeat(states, np.diff(tokens.branch_ptr))
    for a in np.flatnonzero(responses == np.arange(len(responses))).tolist():
        own[int(owner[a])].append(a)
    v = np.zeros(len(states))
    q = np.zeros((heads.ensemble, len(responses)))
    for part in Chosen(np.array(read_at, np.int64), [own[n] for n in read_at]).rows(tokens, budget):
        found = read(model, tokens, part, logits=False, autocast=autocast)
        last = torch.from_numpy(np.cumsum(acting.lengths(tokens, part.branches)) - 1).to(found.taken.device)
        v[part.states] = heads.values(found.states).double().cpu().numpy()
        q[:, part.branches] = heads.q_of(found.tokens[last], found.taken[last]).double().cpu().numpy()
    return v[states], q[:, responses]


def save(heads: TokenHeads, folder: Path) -> None:
    """Write the heads beside the actor that they stand on."""
    save_file(heads.state_dict(), folder / f"{FILE}.safetensors")
    (folder / f"{FILE}.json").write_text(json.dumps(heads.options, indent=2))


def load(folder: Path, model: Any) -> TokenHeads:
    """The heads that `save` wrote, on the device of `model`."""
    heads = TokenHeads(*sizes(model), **json.loads((folder / f"{FILE}.json").read_text()))
    heads.load_state_dict(load_file(folder / f"{FILE}.safetensors"))
    return heads.to(next(model.parameters()).device).eval()


def sizes(model: Any) -> tuple[int, int]:
    """Width of the hidden states, and tokens that the model has scores for."""
    return model.config.hidden_size, model.get_output_embeddings().weight.shape[0]
