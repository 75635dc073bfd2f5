"""The project's own line format: one JSON object per episode, its keys the columns of the store (DESIGN
section 8).

Required: ``steps``, a list of objects, each with ``observation`` or ``messages`` and with ``action`` or
``response``. Everything else may be absent or null, which both mean "not logged".

How rewards are read. Rewards of steps and the outcome of the episode are two records of one thing, so they
are never added.

- Steps carry rewards: they stand as they are. ``outcome_reward``, if absent, is their sum. A null among them
  stays null (flag ``missing_rewards``) and then no sum is taken.
- Only the last step carries one: it is the episode's single outcome, and the earlier steps get 0.
- No step carries one, but ``outcome_reward`` is given, or else ``success`` (1 or 0): it becomes the reward of
  the last action, with ``reward_source=outcome``, and the earlier steps get 0.
- None of these: the episode is kept with null rewards and the flag ``unlabelled``; training leaves it out.
  ``self_reported_success`` and ``labels`` are never a reward.

How the end is read. ``terminated`` and ``truncated`` of the episode, or of its last action, stand as given.
Where neither is given anywhere, the first of these decides: ``end_reason`` (env_done and agent_stop
terminate, step_limit and time_limit truncate, errors and unknown leave null); a logged ``max_steps`` that the
episode reached truncates; a labelled outcome terminates; else both stay null.

Keys that are no column go to ``extra`` of the episode or step, and the episode is flagged ``unknown_keys``.

A line with ``"exact": true`` is an export of a store: nothing of the above is inferred, and source and identity are
those of the episode that was exported (`offline_lm.logs._exact`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from offline_lm.logs import _exact, _files
from offline_lm.logs._adapters import Sample, damaged, rejected
from offline_lm.logs._files import MAX_BYTES, Damaged, Record, lines
from offline_lm.logs._records import (
    Bad,
    Converter,
    convert,
    converters,
    one_of,
    parse,
    record,
)
from offline_lm.types import Candidate, Episode, Rejected, Step

SOURCE = "jsonl"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BY_LINE = True
_COMPUTED = (
    "episode_id",
    "content_hash",
    "source",
    "n_steps",
    "provenance",
    "final_observation",
    "max_steps",
)
"""Keys that an export of the store or this format has beyond the fields of Episode; `n_steps` is checked."""


def detect(sample: Sample) -> str | None:
    if isinstance(steps := sample.keys and sample.value.get("steps"), list) and steps and isinstance(steps[0], dict):
        seen, did = {"observation", "messages"}, {"action", "response"}
        if seen & steps[0].keys() and did & steps[0].keys():
            return "objects with steps that have an observation and an action"
    return None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[Episode | Rejected]:
    """Every line of a file, or of the files ending in `SUFFIXES` under a folder, as an Episode or a Rejected.

    `start` and `stop` are bytes of one file that is not compressed: only lines that begin there.

    Blank lines and a byte order mark are skipped. Offsets are bytes of the decompressed file; sha256 is of
    the line without its end. A file cut inside its compression ends in a Rejected (``damaged_file``); one that cannot
    be opened, or holds no line, is a Rejected (``unreadable_file``, ``empty_file``).

    Raises:
        UserError: a folder without such files.
    """
    return chain.from_iterable(_read_file(file, start, stop) for file in find(path))


def _read_file(path: Path, start: int, stop: int | None) -> Iterator[Episode | Rejected]:
    uri, dataset, end = str(path), path.name, 0
    for suffix in SUFFIXES:
        dataset = dataset.removesuffix(suffix)
    empty = start == 0 and stop is None
    for line in lines(path, start=start, stop=stop):
        if isinstance(line, Damaged):
            yield damaged(SOURCE, path, line, end)
            return
        empty = False
        end = line.offset + len(line.data) + 1
        try:
            if line.too_long:
                raise Bad("too_large", f"the line is longer than {MAX_BYTES} bytes; shorten its pages")
            yield _episode(parse(line.data), line, uri, dataset)
        except Bad as bad:
            yield rejected(SOURCE, path, bad, line.offset, line.data, line.sha256)
    if empty:
        yield rejected(SOURCE, path, Bad("empty_file", "the file holds no line; was it written to the end?"))


# --- fields whose JSON form is freer than their type --------------------------------------------------------

_candidate = record(Candidate)
_candidate_source = one_of("sampled", "enumerated", "search")


def _candidates(value: Any, place: str) -> tuple[Candidate, ...]:
    if type(value) is not list:
        raise Bad("wrong_type", f"{place} must be a list of actions, as strings or objects")
    result = []
    for i, item in enumerate(value):
        here = f"{place}[{i}]"
        candidate = _candidate({"action": item} if type(item) is str else item, here)
        if candidate.source is not None:
            _candidate_source(candidate.source, f"{here}.source")
        _logprob(candidate.logprob, f"{here}.logprob")
        result.append(candidate)
    if sum(c.executed is True for c in result) > 1:
        raise Bad("two_executed", f"{place} has more than one candidate with executed=true; keep one")
    return tuple(result)


def _messages(value: Any, place: str) -> str:
    """A list of {role, content, ...}, or the same as a JSON string; kept as a JSON string."""
    try:
        given = parse(value.encode()) if type(value) is str else value
    except Bad as bad:
        raise Bad(bad.reason, f"{place}: {bad.message}") from None
    if type(given) is not list:
        raise Bad("wrong_type", f"{place} must be a list of objects with a role")
    for i, message in enumerate(given):
        if type(message) is not dict or type(message.get("role")) is not str:
            raise Bad("wrong_type", f"{place}[{i}] must be an object with a role, such as user or assistant")
    return value if type(value) is str else orjson.dumps(given).decode()


def _logprob(value: float | None, place: str) -> None:
    if value is not None and value > 1e-6:
        raise Bad("logprob_above_zero", f"{place} is {value}; the logarithm of a probability is at most 0")


_STEP: dict[str, Converter] = converters(
    Step,
    candidates=_candidates,
    messages=_messages,
    observation_kind=one_of("axtree", "html", "dom", "text", "messages"),
    reward_source=one_of("env", "progress_delta", "judge", "outcome"),
)
_EPISODE: dict[str, Converter] = {
    **converters(
        Episode,
        without=("source", "steps", "uri", "sha256", "quality_flags"),
        policy_kind=one_of("llm", "human", "scripted", "search"),
        end_reason=one_of("env_done", "agent_stop", "step_limit", "time_limit", "agent_error", "env_error", "unknown"),
    ),
    "quality_flags": converters(Episode)["quality_flags"],
}
_LABEL_KIND = one_of("env", "judge", "human", "self")
_LIMITS = ("step_limit", "time_limit")


# --- one line -----------------------------------------------------------------------------------------------


def _episode(value: Any, line: Record, uri: str, dataset: str) -> Episode:
    if type(value) is not dict:
        raise Bad("not_an_object", "the line is not a JSON object; write an episode as one object a line")
    if _exact.is_exact(value):
        return _exact.read(value)
    given = {key: item for key, item in value.items() if key != "steps" and key not in _COMPUTED}
    fields, unknown = convert(_EPISODE, given, "")
    flags = list(fields.pop("quality_flags", ()))
    steps, final, odd_steps = _steps(value, line.offset)
    if unknown or odd_steps:
        flags.append("unknown_keys")
    for i, label in enumerate(fields.get("labels", ())):
        _LABEL_KIND(label.kind, f"labels[{i}].kind")
    n_steps = _optional_int(value, "n_steps")
    if n_steps is not None and n_steps != len(steps):
        flags.append("n_steps_differs")
    max_steps = _optional_int(value, "max_steps")

    flags += _reward(fields, steps)
    flags += _end(fields, steps, max_steps)
    if final is not None:
        steps.append(final)

    extra = fields.pop("extra", {}) | unknown
    extra |= {key: value[key] for key in ("source", "provenance", "max_steps") if value.get(key) is not None}
    native_id = fields.pop("native_id", None) or value.get("episode_id") or line.sha256[:32]
    if type(native_id) is not str:
        raise Bad("wrong_type", "episode_id must be a string")
    return Episode(
        source=SOURCE,
        native_id=native_id,
        dataset=fields.pop("dataset", dataset),
        steps=tuple([Step(step=i, **step) for i, step in enumerate(steps)]),
        uri=uri,
        sha256=line.sha256,
        quality_flags=tuple(dict.fromkeys(flags)),
        extra=extra,
        **fields,
    )


def _optional_int(value: dict[str, Any], key: str) -> int | None:
    item = value.get(key)
    if item is not None and (type(item) is not int or item < 0):
        raise Bad("wrong_type", f"{key} must be an integer of at least 0")
    return item


def _steps(value: dict[str, Any], offset: int) -> tuple[list[dict[str, Any]], dict[str, Any] | None, bool]:
    """(fields of each decision, fields of the final observation, whether a step had unknown keys)."""
    given = value.get("steps")
    if type(given) is not list:
        raise Bad("missing_key" if given is None else "wrong_type", "steps must be a list of objects")
    steps: list[dict[str, Any]] = []
    odd = False
    for i, item in enumerate(given):
        step, unknown = _step(item, f"steps[{i}]", offset)
        odd = odd or unknown
        steps.append(step)
    _check_indices(steps)
    last_is_final = bool(steps) and steps[-1].get("is_final_observation", False)
    final = steps.pop() if last_is_final else None
    after = value.get("final_observation")
    if after is not None:
        if final is not None:
            raise Bad("two_final_observations", "final_observation stands beside a last step that is one; keep one")
        final, unknown = _step({"observation": after} if type(after) is str else after, "final_observation", offset)
        final |= {"is_final_observation": True}
        odd = odd or unknown
    if not steps:
        raise Bad("no_steps", "steps holds no action; an episode needs at least one")
    for i, step in enumerate(steps):
        place = f"steps[{i}]"
        if step.get("is_final_observation"):
            raise Bad("final_observation_not_last", f"{place} is a final observation but not the last step")
        if "observation" not in step and "messages" not in step:
            raise Bad("missing_observation", f"{place} has no observation and no messages; log what the agent saw")
        if "action" not in step and "response" not in step:
            raise Bad("missing_action", f"{place} has neither action nor response; log what the agent did")
        if i + 1 < len(steps) and (step.get("terminated") or step.get("truncated")):
            raise Bad("steps_after_end", f"{place} ends the episode, yet steps follow; split it into two episodes")
    if final is not None:
        _check_final(final)
    return steps, final, odd


def _step(item: Any, place: str, offset: int) -> tuple[dict[str, Any], bool]:
    if type(item) is not dict:
        raise Bad("wrong_type", f"{place} must be an object")
    step, unknown = convert(_STEP, item, f"{place}.")
    ids, logprobs = step.get("response_token_ids"), step.get("response_logprobs")
    if ids is not None and logprobs is not None and len(ids) != len(logprobs):
        message = f"{place} has {len(ids)} response_token_ids and {len(logprobs)} response_logprobs; log one each"
        raise Bad("length_mismatch", message)
    _logprob(step.get("behavior_logprob"), f"{place}.behavior_logprob")
    for i, logprob in enumerate(logprobs or ()):
        _logprob(logprob, f"{place}.response_logprobs[{i}]")
    for name in ("prompt_token_ids", "response_token_ids"):
        if any(token < 0 for token in step.get(name, ())):
            raise Bad("negative_token_id", f"{place}.{name} holds a negative id; log the tokenizer's own ids")
    if unknown:
        step["extra"] = step.get("extra", {}) | unknown
    step.setdefault("source_offset", offset)
    return step, bool(unknown)


def _check_indices(steps: list[dict[str, Any]]) -> None:
    """Indices are renumbered from 0; where logged they must follow each other, or a step is lost or out of
    order."""
    first = steps[0].get("step", 0) if steps else 0
    for i, step in enumerate(steps):
        index, want = step.pop("step", None), first + i
        if index is None or index == want >= 0:
            continue
        if index < 0:
            raise Bad("negative_step", f"steps[{i}].step is {index}; number the steps one by one, from 0")
        message = f"steps[{i}].step is {index}, not {want}; number the steps one by one, in order"
        raise Bad("missing_steps" if index > want else "duplicate_step" if index == want - 1 else "step_order", message)


def _check_final(final: dict[str, Any]) -> None:
    for name in ("action", "response", "reward", "candidates"):
        if name in final:
            raise Bad("final_observation_acts", f"the final observation has {name}; remove it")
    if "observation" not in final and "messages" not in final:
        raise Bad("missing_observation", "the final observation has no observation and no messages")


def _reward(fields: dict[str, Any], steps: list[dict[str, Any]]) -> list[str]:
    """Give every decision its reward, and the episode its outcome, by the rules above; returns quality
    flags."""
    logged = [step.get("reward") for step in steps]
    known = [reward for reward in logged if reward is not None]
    outcome, success = fields.get("outcome_reward"), fields.get("success")
    if not known:
        if outcome is None and success is None:
            return ["unlabelled"]
        outcome = float(bool(success)) if outcome is None else outcome
        steps[-1] |= {"reward": outcome, "reward_source": "outcome"}
    elif len(known) < len(logged) and not (len(known) == 1 and logged[-1] is not None):
        return ["missing_rewards"]
    for step in steps:
        step.setdefault("reward", 0.0)
    total = sum(step["reward"] for step in steps)
    if not math.isfinite(total):
        raise Bad("json_number", "the sum of steps[].reward is not finite; log rewards of a reasonable size")
    fields["outcome_reward"] = total if outcome is None else outcome
    return ["success_without_reward"] if success and total <= 0 else []


def _end(fields: dict[str, Any], steps: list[dict[str, Any]], max_steps: int | None) -> list[str]:
    """Give the episode and its last action the same terminated and truncated, by the rules above."""
    last = steps[-1]
    for name in ("terminated", "truncated"):
        whole, own = fields.get(name), last.get(name)
        if whole is not None and own is not None and whole != own:
            raise Bad("end_conflict", f"{name} of the episode and of its last step differ; log the same")
        if (value := own if whole is None else whole) is not None:
            fields[name] = last[name] = value
    reason = fields.get("end_reason")
    if "terminated" in fields or "truncated" in fields:
        return ["limit_marked_terminated"] if fields.get("terminated") and reason in _LIMITS else []
    if reason is not None:
        ends = {"env_done": True, "agent_stop": True, "step_limit": False, "time_limit": False}.get(reason)
    elif max_steps is not None and len(steps) >= max_steps:
        ends, fields["end_reason"] = False, "step_limit"
    else:
        ends = True if fields.get("outcome_reward") is not None else None
    if ends is not None:
        for where in (fields, last):
            where |= {"terminated": ends, "truncated": not ends}
    return []
