"""The records that every part exchanges: what was logged, and what could not be read.

Field names and their meaning are those of the store's tables (`offline_lm.store.schema`); a test holds the
two together. ``None`` always means "not logged": never 0, never false.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

JSON = dict[str, Any]

Estimand = Literal["returns", "behaviour", "expectile", "optimum", "actor"]
"""What a critic's equations converge to on endless logs. returns: the mean return behind a state, which mixes the
values of the policies that logged it; behaviour: the value of the mixed policy, which bootstrapping finds, since it
forgets who acted; expectile: the fixed point of IQL; optimum: the value of the best policy; actor: that of the policy
that is trained with it. Of a conservative critic: what it would converge to without the penalty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One action that could have been taken at a step; the one that was taken has ``executed=True``."""

    action: str
    response: str | None = None
    logprob: float | None = None
    score: float | None = None
    source: str | None = None
    """sampled, enumerated or search"""
    executed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A judgement of an episode: by the environment, a judge model, a human, or the agent itself."""

    kind: str
    """env, judge, human or self"""
    labeler: str | None = None
    name: str | None = None
    value: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One decision: what the agent saw, what it did, and the outcome *of this action*.

    The final observation of an episode, where it was logged, is a last Step with
    ``is_final_observation=True`` and neither action nor response.
    """

    step: int
    is_final_observation: bool = False
    ts_start: datetime | None = None
    ts_end: datetime | None = None
    # what it saw
    url: str | None = None
    title: str | None = None
    observation: str | None = None
    observation_kind: str | None = None
    """axtree, html, dom, text or messages"""
    observation_error: str | None = None
    screenshot: JSON | None = None
    """sha256, mime, status"""
    messages: str | None = None
    """what this turn added to the conversation, as a JSON list of {role, content}"""
    context_hash: str | None = None
    # what it did
    response: str | None = None
    """the raw output, reasoning included"""
    thought: str | None = None
    action: str | None = None
    """the command alone"""
    action_name: str | None = None
    action_args: JSON | None = None
    action_grammar: str | None = None
    sub_actions: tuple[str, ...] | None = None
    target: JSON | None = None
    """the element acted on: ref, tag, role, text"""
    action_valid: bool | None = None
    action_error: str | None = None
    # what else it could have done
    candidates: tuple[Candidate, ...] | None = None
    candidates_complete: bool | None = None
    # exact tokens, where the agent logged them
    prompt_token_ids: tuple[int, ...] | None = None
    response_token_ids: tuple[int, ...] | None = None
    response_logprobs: tuple[float, ...] | None = None
    behavior_logprob: float | None = None
    tokenizer_id: str | None = None
    # what came of it
    reward: float | None = None
    reward_source: str | None = None
    """env, progress_delta, judge or outcome"""
    progress: float | None = None
    terminated: bool | None = None
    truncated: bool | None = None
    source_offset: int | None = None
    extra: JSON | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One run of one agent on one task."""

    source: str
    """the adapter that read it"""
    native_id: str
    """what the log itself calls it, unique within (source, dataset)"""
    steps: tuple[Step, ...]
    dataset: str | None = None
    # task
    benchmark: str | None = None
    task_id: str | None = None
    task_family: str | None = None
    site: str | None = None
    start_url: str | None = None
    goal: str | None = None
    seed: int | None = None
    trial: int | None = None
    # policy
    policy_id: str | None = None
    policy_kind: str | None = None
    """llm, human, scripted or search"""
    model: str | None = None
    agent: str | None = None
    sampling: JSON | None = None
    # outcome
    outcome_reward: float | None = None
    raw_reward: float | None = None
    success: bool | None = None
    self_reported_success: bool | None = None
    terminated: bool | None = None
    truncated: bool | None = None
    end_reason: str | None = None
    """env_done, agent_stop, step_limit, time_limit, agent_error, env_error or unknown"""
    final_answer: str | None = None
    labels: tuple[Label, ...] = ()
    # tree
    parent_episode_id: str | None = None
    branch_step: int | None = None
    # cost and time
    started_at: datetime | None = None
    duration_s: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost_usd: float | None = None
    # provenance
    uri: str | None = None
    sha256: str | None = None
    """of the bytes that this episode was read from"""
    licence: str | None = None
    adapter_version: str = "1"
    quality_flags: tuple[str, ...] = ()
    extra: JSON = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A record that no episode could be made of; it goes to the table ``quarantine``, never lost."""

    source: str
    uri: str
    offset: int
    """byte offset of the record in its file, or its index where the file is one record"""
    reason: str
    """a stable code in snake_case, e.g. ``json_syntax``"""
    message: str
    """one sentence: what is wrong, where, and the mend"""
    sha256: str | None = None
    excerpt: str | None = None
    """at most 200 characters of the record"""


@dataclass(frozen=True, slots=True)
class Batch:
    """n steps of whole episodes, end to end, as an algorithm sees them.

    The target features are those of the target backbone; they are the same tensors where the backbone is frozen.
    """

    states: Float[Tensor, "n d"]
    """features at the last token of s_t"""
    actions: Float[Tensor, "n d"]
    """features at the last token of a_t; zeros where no action was logged"""
    target_states: Float[Tensor, "n d"]
    target_actions: Float[Tensor, "n d"]
    offsets: Int[Tensor, " e+1"]
    reward: Float[Tensor, " n"]
    continues: Float[Tensor, " n"]
    """1 - terminated"""
    returns: Float[Tensor, " n"]
    """G_t; where `return_mask` is false it is unknown"""
    candidates: Float[Tensor, "m d"]
    """features of every action known at a state, the logged one among them; none where no algorithm asks for them"""
    target_candidates: Float[Tensor, "m d"]
    candidate_of: Int[Tensor, " m"]
    """the row whose candidate it is"""
    acted: Bool[Tensor, " n"]
    return_mask: Bool[Tensor, " n"]
    bootstrap_mask: Bool[Tensor, " n"]
    weight: Float[Tensor, " n"] | None = None
    """of each step in the means of losses, where sampling was biased (`batches.sampling`); None: all alike"""
    candidate_weight: Float[Tensor, " m"] | None = None
    """pi(candidate | state) of an actor, 0 for all candidates of a state where it is not known; None: no actor"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """N steps of E logged episodes end to end, and what a critic says of them: what advantages are made of.

    All in float64 on the CPU; what is unknown is NaN.
    """

    offsets: Int[Tensor, " e+1"]
    reward: Float[Tensor, " n"]
    continues: Float[Tensor, " n"]
    """1 - terminated"""
    returns: Float[Tensor, " n"]
    """G_t"""
    acted: Bool[Tensor, " n"]
    bootstrap_mask: Bool[Tensor, " n"]
    """whether a one-step target exists"""
    v: Float[Tensor, " n"]
    q: Float[Tensor, " n"]
    """of the logged action, the least of the ensemble"""
    outcome: Float[Tensor, " e"]
    """the sum of an episode's rewards"""
    task: Int[Tensor, " e"]
    page: Int[Tensor, " n"]
    """equal where the same was seen in the same task"""
    response_q: Float[Tensor, " m"]
    """of every known response, the least of the ensemble; the logged one is the first of its step's"""
    response_of: Int[Tensor, " m"]
    """the step of each, ascending"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """R responses of T tokens end to end, as the loss of an actor sees them.

    A part of an update's batch: `weight` was made for the whole of it, so that losses of the parts add up.
    """

    logprobs: Float[Tensor, " t"]
    """log pi(token | what stands before it), with gradient"""
    owner: Int[Tensor, " t"]
    """the response that a token belongs to, ascending"""
    weight: Float[Tensor, " t"]
    """of each token in the loss (`losses.policy.token_weights`)"""
    advantages: Float[Tensor, " r"]
    state: Int[Tensor, " r"]
    """responses to the same step have the same number, ascending"""
    old: Float[Tensor, " t"]
    """the same log-probabilities under the policy that ratios are taken to; those of now where none are"""
    reference: Float[Tensor, " t"]
    """and under the policy as the loss began that looks at it, behind `actor.clone_first`"""
    proposal: Float[Tensor, " r"] | None = None
    """how the responses to a state stand for all that could be said (`losses.expectations`); None: they are all"""
