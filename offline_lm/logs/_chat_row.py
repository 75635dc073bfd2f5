"""Rows of chat JSONL for others: an episode as one, what such a row says of it, and what it cannot."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import orjson

from offline_lm.logs._adapters import give_outcome, take, to_json
from offline_lm.logs._chat import ASSISTANT, join
from offline_lm.logs._records import Bad, convert, converters
from offline_lm.types import Episode, Step

Row = dict[str, Any]

SCHEMA = "offline_lm.chat/1"
"""``metadata.schema`` of these rows."""
_OWN_KEYS = {"native_id": "id", "outcome_reward": "reward"} | {
    name: name for name in ("task_id", "trial", "model", "goal", "success", "terminated", "truncated")
}
_PROVENANCE = ("source", "uri", "sha256", "adapter_version")
_DERIVED = ("step", "source_offset", "context_hash")
_COLUMNS = converters(Episode, without=(*_OWN_KEYS, *_PROVENANCE, "steps", "extra"))


def row_of(episode: Episode) -> Row:
    """The row; see `offline_lm.logs.chat.write`. Its values are what JSON knows."""
    acting = [step for step in episode.steps if not step.is_final_observation]
    messages, decisions = join(episode.steps)
    if episode.goal and acting[0].messages is None:  # nothing else would tell a reader of the messages
        messages = [{"role": "system", "content": f"Goal: {episode.goal}"}, *messages]
        decisions = [i + 1 for i in decisions]
    row: Row = {"messages": messages}
    row |= {key: value for name, key in _OWN_KEYS.items() if (value := getattr(episode, name)) is not None}
    if decisions != [i for i, message in enumerate(messages) if message.get("role") in ASSISTANT]:
        row["decisions"] = decisions
    row |= _rewards(episode, acting)
    if any(step.response_token_ids for step in acting):
        row["trajectory"] = [{"tokens": _token_record(step)} for step in acting]
    columns = {name: value for name in _COLUMNS if (value := getattr(episode, name)) not in (None, ())}
    row["metadata"] = {"schema": SCHEMA, "episode": columns, "extra": episode.extra}
    return orjson.loads(to_json(row))


def _rewards(episode: Episode, acting: list[Step]) -> Row:
    as_outcome: list[dict[str, Any]] = [{} for _ in acting]
    give_outcome(as_outcome, episode.outcome_reward)
    logged = [(step.reward, step.reward_source) for step in acting]
    if logged == [(step.get("reward"), step.get("reward_source")) for step in as_outcome]:
        return {}
    source = next((source for _, source in logged if source), None)
    return {"rewards": [reward for reward, _ in logged]} | ({"reward_source": source} if source else {})


def _token_record(step: Step) -> Row | None:
    if step.response_token_ids is None:
        return None
    given = {
        "prompt_ids": step.prompt_token_ids,
        "completion_ids": step.response_token_ids,
        "completion_logprobs": step.response_logprobs,
        "tokenizer_id": step.tokenizer_id,
    }
    return {key: value for key, value in given.items() if value is not None}


def lost(given: Episode, back: Episode) -> list[str]:
    """The columns of an episode that had a value and came back otherwise; those of steps as ``steps.NAME``."""
    names = [
        f.name
        for f in fields(Episode)
        if f.name not in (*_PROVENANCE, "steps") and _has_lost(getattr(given, f.name), getattr(back, f.name))
    ]
    if len(given.steps) != len(back.steps):
        return [*names, "steps"]
    pairs = list(zip(given.steps, back.steps, strict=True))
    return names + [
        f"steps.{f.name}"
        for f in fields(Step)
        if f.name not in _DERIVED and any(_has_lost(getattr(a, f.name), getattr(b, f.name)) for a, b in pairs)
    ]


def _has_lost(given: Any, back: Any) -> bool:
    return given not in (None, (), {}) and given != back


def said(row: Row) -> tuple[Row, Row] | None:
    """(columns, extra) that ``metadata`` of a row of `row_of` holds; None for rows of others."""
    metadata = row.get("metadata")
    if type(metadata) is not dict or metadata.get("schema") != SCHEMA:
        return None
    columns, unknown = convert(_COLUMNS, take(metadata, "episode", dict, "metadata") or {}, "metadata.episode.")
    if unknown:
        raise Bad("unknown_key", f"metadata.episode has {', '.join(unknown)[:80]}; it may have: {', '.join(_COLUMNS)}")
    return columns, take(metadata, "extra", dict, "metadata") or {}
