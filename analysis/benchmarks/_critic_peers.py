"""How others update a critic through a language model, written out minimally, for `critic_update`.

    offline_archer  andreazanette/OfflineArcher at 56d3b72: `RobertaCritic.iql_loss` (Algorithms.py) over
                    `ArcherDoubleCritic` (ArcherCritic.py)
    archer          YifeiZhou02/ArCHer at 1bcbf80: `ArcherTrainer.critic_loss` (archer/algorithms/archer/trainer.py)
                    over `DoubleCritic` (archer/models/critic.py)
    ilql            CarperAI/trlx at 232866e: `ILQLConfig.loss` and `AutoModelForCausalLMWithILQLHeads`
                    (trlx/models/modeling_ilql.py); Sea-Snell/Implicit-Language-Q-Learning's `PerTokenIQL` has the same
                    shape (src/models/iql_model.py)
    padded          our loss and heads, read from a padded batch with an attention mask rather than a packed row

Both ArCHers encode state and action apart, each padded to the longest of its batch with an attention mask, and read one
vector of each; their Q is an MLP on the two, end to end. Their encoder is a RoBERTa; here it is the benchmark's own
transformer (which of its positions is read costs the same). They truncate to 512 tokens, on the left. Both tokenise
text in every update, which is left out here, and update their target in a Python loop, which here is one call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from offline_lm.algos.iql_lm import IQL
from offline_lm.models.heads import Heads, polyak
from offline_lm.types import Batch

GAMMA, TAU, POLYAK, LR = 0.95, 0.8, 0.005, 1e-5


@dataclass(frozen=True)
class Trajectory:
    """T turns as token ids; the state behind the last action is empty, since the trajectory ends there."""

    states: Sequence[Tensor]
    actions: Sequence[Tensor]
    reward: Tensor
    continues: Tensor

    def part(self, turns: Sequence[int]) -> Trajectory:
        at = list(turns)
        return Trajectory(
            [self.states[t] for t in at], [self.actions[t] for t in at], self.reward[at], self.continues[at]
        )

    def __len__(self) -> int:
        return len(self.states)


def mlp(inputs: int, width: int, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def padded(sequences: Sequence[Tensor], limit: int | None = None) -> tuple[Tensor, Tensor]:
    """ids and mask [n, longest], padded on the right, truncated on the left."""
    cut = [s if limit is None else s[-limit:] for s in sequences]
    ids = nn.utils.rnn.pad_sequence(list(cut), batch_first=True)
    lengths = torch.tensor([len(s) for s in cut], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def last_hidden(body: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[n, L, d]; a batch without padding needs no mask, and then attention runs its causal kernel."""
    full = bool(mask.all())
    return body(input_ids=ids, attention_mask=None if full else mask, use_cache=False).last_hidden_state


class DoubleCritic(nn.Module):
    """The encoder with twin Q on [state, action] and twin V on the state, each read off its last token."""

    def __init__(self, body: Any, width: int, limit: int | None) -> None:
        super().__init__()
        self.body, self.limit = body, limit
        self.q = nn.ModuleList(mlp(2 * width, width) for _ in range(2))
        self.v = nn.ModuleList(mlp(width, width) for _ in range(2))

    def encode(self, sequences: Sequence[Tensor]) -> Tensor:
        ids, mask = padded(sequences, self.limit)
        hidden = last_hidden(self.body, ids, mask)
        return hidden[torch.arange(len(ids)), mask.sum(1) - 1]

    def get_q(self, states: Sequence[Tensor], actions: Sequence[Tensor]) -> list[Tensor]:
        both = torch.cat([self.encode(states), self.encode(actions)], dim=1)
        return [q(both)[:, 0] for q in self.q]

    def get_v(self, states: Sequence[Tensor]) -> list[Tensor]:
        encoded = self.encode(states)
        return [v(encoded)[:, 0] for v in self.v]

    def forward(self, states: Sequence[Tensor], actions: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        encoded = self.encode(states)
        both = torch.cat([encoded, self.encode(actions)], dim=1)
        return [q(both)[:, 0] for q in self.q], [v(encoded)[:, 0] for v in self.v]


Loss = Callable[[Any, Any, Trajectory, Sequence[Tensor]], Tensor]
"""(critic, target, turns, the states that follow them)"""


def offline_archer(
    critic: DoubleCritic, target: DoubleCritic, turns: Trajectory, following: Sequence[Tensor]
) -> Tensor:
    """IQL: six encodings, of which three with gradients: state and action for Q, the state again for V."""
    q = critic.get_q(turns.states, turns.actions)
    with torch.no_grad():
        y = [turns.reward + GAMMA * turns.continues * v for v in target.get_v(following)]
        q_bar = target.get_q(turns.states, turns.actions)
    v = critic.get_v(turns.states)
    u = [a - b for a, b in zip(q_bar, v, strict=True)]
    expectile = [(torch.where(x > 0, TAU, 1 - TAU) * x**2).mean() for x in u]
    return torch.stack([*map(mse_loss, q, y), *expectile]).sum()


def archer(critic: DoubleCritic, target: DoubleCritic, turns: Trajectory, following: Sequence[Tensor]) -> Tensor:
    """Six encodings, two with gradients; sampling the policy's action is left out, the logged one stands for it."""
    q, v = critic(turns.states, turns.actions)
    with torch.no_grad():
        q_bar, _ = target(turns.states, turns.actions)
        _, v_next = target(following, turns.actions)
    y = [turns.reward + GAMMA * turns.continues * x for x in v_next]
    return torch.stack([*map(mse_loss, q, y), *map(mse_loss, v, q_bar)]).sum()


def accumulated(
    loss: Loss, body: Any, width: int, trajectory: Trajectory, *, limit: int | None, batch: int
) -> Callable[[], None]:
    """An update of either ArCHer: `batch` turns at a time, gradients accumulated over the trajectory."""
    critic = DoubleCritic(body, width, limit).to(trajectory.reward.device)
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=LR, fused=True)
    n = len(trajectory)

    def update() -> None:
        optimizer.zero_grad()
        for start in range(0, n, batch):
            at = range(start, min(start + batch, n))
            following = [trajectory.states[min(t + 1, n - 1)] for t in at]
            (loss(critic, target, trajectory.part(at), following) * (len(at) / n)).backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        polyak(target, critic, POLYAK)

    return update


class TokenHeads(nn.Module):
    """V of every token and twin Q of the whole vocabulary, with target Q heads on the same hidden states."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.v = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
        self.q = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, vocabulary)) for _ in range(2)
        )
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)


def ilql(model: Any, width: int, trajectory: Trajectory, *, batch: int) -> Callable[[], None]:
    """ILQL: a turn is a sequence [state, action], padded and masked; every token of the action is an action.

    IQL over tokens, CQL as a cross-entropy of Q, and the cloning loss on the language model's logits of all tokens.
    """
    heads = TokenHeads(width, model.config.vocab_size).to(trajectory.reward.device)
    parameters = [p for m in (model, heads) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    n = len(trajectory)

    def loss(turns: Trajectory) -> Tensor:
        ids, mask = padded([torch.cat(pair) for pair in zip(turns.states, turns.actions, strict=True)])
        hidden = last_hidden(model.base_model, ids, mask)
        logits = model.lm_head(hidden)
        row = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(a) for a in turns.actions]))
        at = torch.cat([len(s) - 1 + torch.arange(len(a)) for s, a in zip(turns.states, turns.actions, strict=True)])
        ends = torch.cat([torch.arange(len(a)) == len(a) - 1 for a in turns.actions]).to(ids.device)
        taken, read = ids[row, at + 1], hidden[row, at]
        q = [head(read) for head in heads.q]
        with torch.no_grad():
            q_bar = torch.stack([head(read).gather(1, taken[:, None])[:, 0] for head in heads.target_q]).amin(0)
        v, v_next = heads.v(read)[:, 0], heads.v(hidden[row, at + 1])[:, 0]
        y = ends * turns.reward[row] + GAMMA * ~ends * v_next.detach()
        u = q_bar - v
        parts = [mse_loss(x.gather(1, taken[:, None])[:, 0], y) + cross_entropy(x, taken) for x in q]
        parts += [(torch.where(u > 0, TAU, 1 - TAU) * u**2).mean(), cross_entropy(logits[row, at], taken)]
        return torch.stack(parts).sum()

    def update() -> None:
        optimizer.zero_grad()
        for start in range(0, n, batch):
            at = range(start, min(start + batch, n))
            (loss(trajectory.part(at)) * (len(at) / n)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        polyak(heads.target_q, heads.q, POLYAK)

    return update


def padded_pass(body: Any, width: int, trajectory: Trajectory, outcome: dict[str, Tensor]) -> Callable[[], None]:
    """Our update, but for the pass: 16 sequences [state, action], padded, with an attention mask."""
    heads = Heads(width).to(trajectory.reward.device)
    target = copy.deepcopy(heads).requires_grad_(False)
    algo = IQL(gamma=GAMMA, tau=TAU, polyak=POLYAK)
    parameters = [*body.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    rows = torch.arange(len(trajectory))
    at_v = torch.tensor([len(s) - 1 for s in trajectory.states])

    def update() -> None:
        ids, mask = padded([torch.cat(pair) for pair in zip(trajectory.states, trajectory.actions, strict=True)])
        hidden = last_hidden(body, ids, mask)
        states, actions = hidden[rows, at_v], hidden[rows, mask.sum(1) - 1]
        none = states[:0].detach()
        batch = Batch(
            states,
            actions,
            states.detach(),
            actions.detach(),
            candidates=none,
            target_candidates=none,
            candidate_of=torch.zeros(0, dtype=torch.long),
            **outcome,
        )  # type: ignore[arg-type]
        optimizer.zero_grad()
        torch.stack(list(algo.loss(heads, target, batch).values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        polyak(target, heads, POLYAK)

    return update
