"""Policies of `collect` whose models run here: a critic's Q, an actor among candidates, language models that write."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offline_lm.batches.render import frame
from offline_lm.batches.tokens import encode
from offline_lm.envs import chat
from offline_lm.envs.policies import Array, Choice, Chooser, State, draw, greedy, mix, untried
from offline_lm.envs.written import Judge, Proposal, Sample
from offline_lm.errors import UserError
from offline_lm.models import backbone
from offline_lm.models.critic import Critic, find_run, find_run_folder
from offline_lm.models.features import fingerprint
from offline_lm.models.generation import Response
from offline_lm.policy import FILE, Policy, Reranker


def kind_of(run: str, store: str) -> tuple[Path, str]:
    """(folder of the run that `run` names, "actor" or "critic"); a run that holds both is an actor.

    Raises:
        UserError: no such run, or it holds neither.
    """
    folder = find_run_folder(run, store, "config.yaml")
    for file, kind in ((FILE, "actor"), ("critic.json", "critic")):
        if (folder / file).is_file():
            return folder, kind
    raise UserError(f"run:{run}: {folder} holds neither an actor ({FILE}) nor a critic (critic.json)")


# -- critics -----------------------------------------------------------------------------------------------------


def judge(run: str, store: str, device: torch.device) -> Judge:
    """The critic of a run: its Q of every candidate of all pages in one batch.

    Raises:
        UserError: no such run, or it has no Q.
    """
    folder = find_run(run, store)
    critic = Critic.from_pretrained(folder)
    critic.model.to(device)
    critic.heads.to(device)
    name = folder.name
    if not critic.config["has_q"]:
        raise UserError(f"run:{run}: {name} has V alone; one with Q is wanted (algo=q_mc, iql_lm ...)")
    return Judge(
        name,
        f"{name}@{_sha256(critic.model, critic.heads)}",
        critic.rendering["context"],
        Reranker(critic).values,
    )


def ranked(critic: Judge, *, epsilon: float, temperature: float, repeats: bool) -> Chooser:
    """The page's actions by softmax(Q / temperature); at 0 the greatest.

    Without `repeats` only those that were not done on this very page before, while there are any (`untried`).
    """

    def probabilities(states: Sequence[State]) -> list[tuple[Array, Sequence[float] | None]]:
        q = critic.values([s.asked(critic.context, s.actions) for s in states])
        open_to = q if repeats else [untried(each, s.actions, s.tried()) for s, each in zip(states, q, strict=True)]
        return [(greedy(own, temperature), each.tolist()) for own, each in zip(open_to, q, strict=True)]

    name = f"q-{critic.name}" + (f"-t{temperature:g}" if temperature else "") + ("" if repeats else "-once")
    return Chooser(name, probabilities, epsilon, "search", critic.model, temperature)


# -- actors among the page's actions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Actor:
    """An actor among the page's actions: softmax(log pi(a | s) / temperature), at 0 the likeliest.

    A step's `response_logprobs` are those of the model, log pi(token | before it): it is they that ratios of training
    compare. `behavior_logprob` is the chance that the action had among the others, `epsilon` included.
    """

    run: str
    policy: Policy
    temperature: float
    epsilon: float
    model: str
    kind: str = "llm"

    @property
    def policy_id(self) -> str:
        return f"pi-{self.run}-t{self.temperature:g}" + (f"-eps{self.epsilon:g}" if self.epsilon else "")

    @property
    def sampling(self) -> dict[str, Any]:
        return {"over": "candidates", "epsilon": self.epsilon, "temperature": self.temperature}

    def act(self, states: Sequence[State]) -> list[Choice]:
        context = self.policy.config["context"]
        scored = self.policy.token_logprobs([s.asked(context, s.actions) for s in states])
        return [self._choice(s, prompt, each) for s, (prompt, each) in zip(states, scored, strict=True)]

    def _choice(self, state: State, prompt: list[int], responses: list[Response]) -> Choice:
        scores = [each.logprob for each in responses]
        choice = draw(state, mix(greedy(scores, self.temperature), self.epsilon), scores)
        taken = responses[state.actions.index(choice.action)]
        logged = {"response": choice.action, **_tokens(self.policy, prompt, taken)}
        return replace(choice, logged=logged, tokens=(len(prompt), len(taken.ids)))


# -- language models that write ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """A language model here, as a `offline_lm.envs.written.Proposer`: all pages in one batch.

    An actor of a run reads a page as in training; any other model is asked as `envs.chat.prompt` does, in the frame of
    its chat template. Log-probabilities are those of drawing each token, at `temperature`.
    """

    label: str
    policy: Policy
    temperature: float
    max_tokens: int
    model: str
    page_chars: int | None
    """of `envs.chat.prompt`; None: an actor of a run, which is asked otherwise"""

    @property
    def name(self) -> str:
        page = "" if self.page_chars is None else f"-p{self.page_chars}"
        return f"{self.label}-t{self.temperature:g}-m{self.max_tokens}{page}"

    @property
    def sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "max_tokens": self.max_tokens}

    def propose(self, states: Sequence[State], n: int) -> list[Proposal]:
        prompts = self._prompts(states)
        options = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        drawn = self.policy.generate(prompts, n, [s.rng for s in states], **options)
        return [self._proposal(prompt, each) for prompt, each in zip(prompts, drawn, strict=True)]

    def _prompts(self, states: Sequence[State]) -> list[list[int]]:
        if self.page_chars is None:
            return self.policy.prompts([s.asked(self.policy.config["context"], ()) for s in states])
        tokenizer, asked = self.policy.tokenizer, [chat.prompt(s, self.page_chars) for s in states]
        shape = frame(tokenizer)
        marks = encode(tokenizer, (shape.before, shape.after), special=True)
        ids = encode(tokenizer, asked)  # a page that spells a chat's markers opens no turn
        prompts = [[*marks[shape.before], *ids[text], *marks[shape.after]] for text in asked]
        most = getattr(self.policy.model.config, "max_position_embeddings", None)
        if most is not None and (longest := max(map(len, prompts))) + self.max_tokens > most:
            raise UserError(
                f"{self.model} reads {most} tokens, fewer than {longest} of a prompt and max_tokens={self.max_tokens}:"
                f" lower page_chars={self.page_chars}"
            )
        return prompts

    def _proposal(self, prompt: list[int], drawn: list[Response]) -> Proposal:
        samples = [Sample(self.policy.text(r.ids), r.logprob, _tokens(self.policy, prompt, r)) for r in drawn]
        return Proposal(samples, {}, (len(prompt), sum(len(r.ids) for r in drawn)))


def _tokens(policy: Policy, prompt: list[int], response: Response) -> dict[str, Any]:
    """The fields of a step that say exactly what was read and written."""
    return {
        "prompt_token_ids": tuple(prompt),
        "response_token_ids": tuple(response.ids),
        "response_logprobs": tuple(response.logprobs),
        "tokenizer_id": policy.tokenizer_id,
    }


def actor(folder: Path, device: torch.device) -> tuple[Policy, str]:
    """(the actor of a run, NAME@HASH)."""
    policy = Policy.from_pretrained(folder)
    return policy, f"{folder.name}@{_placed(policy, device)}"


def pretrained(path: str, device: torch.device) -> tuple[Policy, str]:
    """(a language model of `transformers`, or `reader`, NAME@HASH).

    Raises:
        UserError: none there.
    """
    policy = Policy(*backbone.load(path, key="policy=lm"), config={})
    return policy, f"{Path(path).name}@{_placed(policy, device)}"


def _placed(policy: Policy, device: torch.device) -> str:
    """The hash of a policy, now on the device."""
    heads = [] if policy.heads is None else [policy.heads]
    for module in (policy.model, *heads):
        module.to(device)
    return _sha256(policy.model, *heads)


def _sha256(model: Any, *heads: nn.Module) -> str:
    """12 hex digits: of `features.fingerprint` of a model, and of the weights on top of it."""
    digest = hashlib.sha256(fingerprint(model).encode())
    for name, weight in (item for module in heads for item in sorted(module.state_dict().items())):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]
