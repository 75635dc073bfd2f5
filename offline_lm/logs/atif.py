"""Agent Trajectory Interchange Format 1.0 to 1.8 (ATIF; Harbor RFC 0001, ``rfcs/0001-trajectory-format.md``).

A Harbor trial is a folder: ``agent/trajectory.json``, the verifier's ``verifier/reward.txt`` (a number) or
``reward.json`` (``{name: number}``), and ``result.json``. A trajectory that lies alone is read too, without a reward.

``steps[]`` hold turns of ``source`` user, system or agent. Each agent step is a decision: ``message`` is what it said,
``reasoning_content`` its thought, ``tool_calls`` its command, and ``observation.results`` what came back, which is
what the next decision sees. So a step's ``messages`` are the turns since the decision before. Exact tokens
(``metrics.prompt_token_ids``, ``completion_token_ids``, ``logprobs``) are kept. Pictures are files beside the
trajectory; a path that leads out of that folder is recorded as missing.

- ``is_copied_context`` (1.5): no decision of this trajectory. Such turns stand in the ``messages`` of the first
  decision after them, for the agent saw them, and become no steps.
- ``continued_trajectory_ref``: the agent went on in another file after its context was cut. The files are one
  episode; the first decision in each has ``extra.context_reset``.
- ``subagent_trajectories`` (1.7): each is an episode of its own, ``PARENT/TRAJECTORY_ID``, without a reward.
  ``extra.parent`` names the parent, and the parent's step keeps the reference in ``extra.subagents``.
- ``llm_call_count`` 0: the agent's own code acted, not the model; kept, flag ``scripted_steps``.

The outcome is the verifier's file; it wins over ``result.json`` (flag ``reward_conflict`` where they differ). Of
several named rewards the one called ``reward`` counts, else none does and all stand in ``labels`` (kind env). A reward
of 1 is a success, 0 a failure, anything between says neither. A file that holds no number leaves the episode
unlabelled (``reward_unreadable``). ``AgentTimeoutError`` truncates (time_limit); another exception has
``end_reason=agent_error``. A trial that was judged and had no exception ended by itself; whether the agent hit a turn
limit of its own is not logged, so ``truncated`` stays null.

Newer minor versions are read as 1.8 (flag ``newer_version``); another major is refused (``unsupported_version``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.errors import UserError
from offline_lm.logs import _chat, _media
from offline_lm.logs._adapters import Sample, give_outcome, need, numbered, rejected, take, to_json
from offline_lm.logs._files import MAX_BYTES
from offline_lm.logs._harbor import Outcome, is_number, load, outcome_of
from offline_lm.logs._records import Bad, parse
from offline_lm.logs._records import _time as time_of
from offline_lm.types import JSON, Episode, Label, Rejected

SOURCE = "atif"
NEWEST = 8
_VERSION = re.compile(r"\A(?:ATIF-)?v?(\d{1,4})\.(\d{1,4})\Z")
_NAME = re.compile(r"(?:\Atrajectory(?:-[^.]*)?|atif[^.]*)\.json\Z")
MAX_FILES = 1000
"""Longest chain of continuations that is followed."""
_STEP_EXTRA = ("model_name", "reasoning_effort", "llm_call_count", "extra")
_INT32 = 2**31


def _is_trial(path: Path) -> bool:
    return (path / "agent" / "trajectory.json").is_file()


def detect(sample: Sample) -> str | None:
    if sample.is_dir:
        return "a Harbor trial" if "agent" in sample.names and _is_trial(sample.path) else None
    version = sample.value.get("schema_version") if {"schema_version", "steps"} <= sample.keys else None
    if type(version) is str and (version.startswith("ATIF-") or (_VERSION.match(version) and "agent" in sample.keys)):
        return f"schema_version {version}"
    return None


def find(path: Path) -> Iterator[Path]:
    """Trial folders, and trajectories that lie alone (``trajectory.json``, ``trajectory-ID.json``, ``*atif*.json``)."""
    nothing = True
    for found in _below(path):
        nothing = False
        yield found
    if nothing:
        raise UserError(
            f"{path} holds no Harbor trial (agent/trajectory.json) and no trajectory.json; name another path"
        )


def _below(path: Path) -> Iterator[Path]:
    if not path.is_dir() or _is_trial(path):
        yield path
        return
    for entry in sorted(path.iterdir(), key=lambda p: p.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _below(entry)
        elif _NAME.search(entry.name):
            yield entry


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every trial and lone trajectory at or below `path`, each followed by its subagents' episodes.

    Raises UserError for a folder without any.
    """
    return chain.from_iterable(map(_read, find(path)))


def _read(path: Path) -> Iterator[Episode | Rejected]:
    trial = path if path.is_dir() else None
    file = path / "agent" / "trajectory.json" if trial else path
    data = b""
    try:
        documents, data = _documents(file)
        outcome = outcome_of(trial) if trial else Outcome()
        name, dataset = _named(path)
        where = {"dataset": dataset, "uri": str(path), "sha256": hashlib.sha256(data).hexdigest()}
        episodes = [_episode(documents, file, name, outcome, where)]
        for document in documents:
            episodes += _subagents(document, file, name, where)
    except Bad as bad:
        yield rejected(SOURCE, file, bad, 0, data)
        return
    yield from episodes


def _named(path: Path) -> tuple[str, str | None]:
    """(native_id, dataset): trial and job. Not the session_id, which several documents may share."""
    root = path.parent if path.name == "trajectory.json" else path
    if root.name == "agent":
        root = root.parent
    name = root.name.removesuffix(".json")
    if root.parent.name == "steps":  # a task of several steps: JOB/TRIAL/steps/STEP
        root = root.parent.parent
        name = f"{root.name}/{name}"
    return name, root.parent.name or None


def _documents(file: Path) -> tuple[list[Any], bytes]:
    """The trajectory and its continuations, in order, and all their bytes."""
    documents: list[Any] = []
    data = b""
    names = {file.name}
    while True:
        document, part = load(file)
        _check_version(document)
        documents.append(document)
        data += part
        following = take(document, "continued_trajectory_ref", str)
        name = Path(following or "").name
        if not _is_name(name) or name in names or not (file.parent / name).is_file():
            return documents, data
        if len(names) >= MAX_FILES or len(data) > MAX_BYTES:
            raise Bad("too_large", f"more than {MAX_FILES} continuations or {MAX_BYTES} bytes; is it one trajectory?")
        names.add(name)
        file = file.parent / name


def _is_name(name: str) -> bool:
    """Whether a folder may hold a file of that name, and nothing but that."""
    return name not in ("", "/", "..") and "\0" not in name and len(name.encode()) <= 255


def _check_version(document: Any) -> int:
    """The minor version."""
    if type(document) is not dict:
        raise Bad("not_an_object", "not a JSON object; a trajectory has schema_version, agent and steps")
    given = need(document, "schema_version", str)
    version = _VERSION.match(given)
    if version is None or version[1] != "1":
        raise Bad("unsupported_version", f"schema_version is {given[:40]!r}; ATIF-v1.0 to v1.{NEWEST} are read")
    return int(version[2])


# --- episodes -----------------------------------------------------------------------------------------------


def _episode(documents: list[Any], file: Path, name: str, outcome: Outcome, where: JSON) -> Episode:
    first = documents[0]
    flags = list(outcome.flags)
    steps: list[JSON] = []
    for i, document in enumerate(documents):
        own = _steps(document, file, flags)
        if i and own:
            own[0]["extra"] = own[0].get("extra", {}) | {"context_reset": True}
        if steps and steps[-1].get("is_final_observation") and own:
            steps.pop()  # what followed the cut is in the next file
        steps += own
    if max(map(_check_version, documents)) > NEWEST:
        flags.append("newer_version")
    reward = outcome.reward
    give_outcome(steps, reward)
    if reward is None:
        flags.append("unlabelled")
    acting = [step for step in steps if not step.get("is_final_observation")]
    end = _end(outcome)
    if acting:
        acting[-1] |= {key: end[key] for key in ("terminated", "truncated")}
    agent = need(first, "agent", dict)
    model = take(agent, "model_name", str, "agent")
    started, finished = (_time(outcome.result.get(key)) for key in ("started_at", "finished_at"))
    goals = (s for s in need(first, "steps", list) if s["source"] == "user" and not s.get("is_copied_context"))
    goal = next((_chat.content_text(step.get("message"), "message")[0] for step in goals), None)
    extra = {key: first[key] for key in ("notes", "final_metrics", "extra", "session_id") if first.get(key) is not None}
    extra["agent"] = agent
    return Episode(
        source=SOURCE,
        native_id=name,
        steps=numbered(steps),
        task_id=_text(outcome.result.get("task_name")),
        benchmark=_text(outcome.result.get("source")),
        goal=goal,
        policy_id=f"{need(agent, 'name', str, 'agent')}/{model}" if model else need(agent, "name", str, "agent"),
        policy_kind="llm",
        model=model,
        agent=agent["name"],
        outcome_reward=reward,
        raw_reward=reward,
        success={1.0: True, 0.0: False}.get(reward) if reward is not None else None,
        labels=tuple([Label(kind="env", labeler="verifier", name=k, value=v) for k, v in outcome.rewards.items()]),
        started_at=started or (acting[0].get("ts_start") if acting else None),
        duration_s=(finished - started).total_seconds() if started and finished else None,
        quality_flags=tuple(dict.fromkeys(flags)),
        extra=extra | outcome.extra,
        **_costs(documents),
        **end,
        **where,
    )


def _text(value: Any) -> str | None:
    return value if type(value) is str else None


def _time(value: Any) -> Any:
    return None if value is None else time_of(value, "result.json: started_at or finished_at")


def _end(outcome: Outcome) -> JSON:
    if outcome.exception == "AgentTimeoutError":
        return {"terminated": False, "truncated": True, "end_reason": "time_limit"}
    if outcome.exception is not None and not outcome.exception.startswith("Verifier"):
        return {"terminated": None, "truncated": None, "end_reason": "agent_error"}
    if outcome.reward is not None and outcome.result:
        return {"terminated": True, "truncated": None, "end_reason": "agent_stop"}
    return {"terminated": None, "truncated": None, "end_reason": None}


def _costs(documents: list[Any]) -> JSON:
    """Totals of the last file that has them, else sums where every decision was counted."""
    total = next((m for d in reversed(documents) if (m := take(d, "final_metrics", dict))), {})
    steps = [s for d in documents for s in d["steps"] if s.get("source") == "agent" and not s.get("is_copied_context")]
    metrics = [take(step, "metrics", dict) or {} for step in steps if step.get("llm_call_count") != 0]
    costs: JSON = {}
    for field, whole_key, key, kind in (
        ("tokens_in", "total_prompt_tokens", "prompt_tokens", int),
        ("tokens_out", "total_completion_tokens", "completion_tokens", int),
        ("cost_usd", "total_cost_usd", "cost_usd", float),
    ):
        counted = [take(m, key, kind, "metrics") for m in metrics]
        known = sum(counted) if counted and None not in counted else None
        logged = take(total, whole_key, kind, "final_metrics")
        costs[field] = known if logged is None or len(documents) > 1 else logged
    return costs


def _steps(document: Any, file: Path, flags: list[str]) -> list[JSON]:
    """The fields of each decision of one document."""
    copied: list[JSON] = []
    said: list[JSON] = []
    decisions: list[JSON] = []
    shots: list[JSON] = []
    previous = 0
    for i, step in enumerate(need(document, "steps", list)):
        place = f"steps[{i}]"
        number, source = need(step, "step_id", int, place), need(step, "source", str, place)
        if source not in ("user", "system", "agent"):
            raise Bad("bad_value", f"{place}.source is {source[:40]!r}; it must be user, system or agent")
        if number != previous + 1 and previous:
            raise Bad("missing_steps", f"{place}.step_id is {number} after {previous}; steps are counted by one")
        previous = number
        turns, pictures = _turns(step, source, file, place)
        if take(step, "is_copied_context", bool, place):
            if said:
                said += [turn | {"role": "copied"} if turn["role"] == "assistant" else turn for turn in turns]
            else:
                copied += turns
            continue
        if source == "agent":
            decisions.append(_decision(step, place, shots))
            shots = []
            if step.get("llm_call_count") == 0:
                flags.append("scripted_steps")
        shots += pictures
        said += turns
    steps = _chat.split(said)
    for made, decision in zip(steps, decisions, strict=False):
        extra = made.pop("extra", {}) | decision.pop("extra")
        made |= decision | ({"extra": extra} if extra else {})
    if shots and steps and steps[-1].get("is_final_observation"):
        steps[-1]["screenshot"] = shots[-1]
    if copied and steps:
        context = to_json(copied)
        steps[0]["messages"] = to_json(copied + parse(steps[0]["messages"].encode(), refuse_duplicates=False))
        for made in steps:
            made["context_hash"] = hashlib.sha256((context + made["context_hash"]).encode()).hexdigest()
    return steps


def _turns(step: JSON, source: str, file: Path, place: str) -> tuple[list[JSON], list[JSON]]:
    """A step as messages: what was said, then the results of its tools; and the pictures in the results."""
    text, shots = _content(step.get("message"), file, f"{place}.message")
    turn: JSON = {"role": "assistant" if source == "agent" else source, "content": text}
    if (thought := take(step, "reasoning_content", str, place)) is not None:
        turn["reasoning_content"] = thought
    calls = take(step, "tool_calls", list, place) or []
    if calls and source == "agent":
        turn["tool_calls"] = [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
    turns = [turn]
    for i, result in enumerate(take(take(step, "observation", dict, place) or {}, "results", list, place) or []):
        here = f"{place}.observation.results[{i}]"
        answer: JSON = {"role": "tool"}
        if (call := take(result, "source_call_id", str, here)) is not None:
            answer["tool_call_id"] = call
        answer["content"], pictures = _content(result.get("content"), file, f"{here}.content")
        shots += pictures
        turns.append(answer)
    return turns, shots


def _call(call: Any, place: str) -> JSON:
    name = need(call, "function_name", str, place)
    arguments = take(call, "arguments", dict, place)
    return {"id": take(call, "tool_call_id", str, place), "function": {"name": name, "arguments": arguments}}


def _content(content: Any, file: Path, place: str) -> tuple[str, list[JSON]]:
    """Text, with ``[image SHA256]`` for pictures (1.6), which are files beside the trajectory."""
    if type(content) is not list:
        return _chat.content_text(content, place)
    texts: list[str] = []
    shots: list[JSON] = []
    for i, part in enumerate(content):
        kind = need(part, "type", str, f"{place}[{i}]")
        if kind == "text":
            texts.append(need(part, "text", str, f"{place}[{i}]"))
        elif kind == "image":
            shot = _picture(
                need(need(part, "source", dict, f"{place}[{i}]"), "path", str, f"{place}[{i}].source"), file
            )
            shots.append(shot)
            texts.append(f"[image {shot['sha256'] or shot['status']}]")
        else:
            texts.append(to_json(part))
    return "\n".join(texts), shots


def _picture(name: str, file: Path) -> JSON:
    """The log is not trusted to name files elsewhere."""
    parts = Path(name).parts
    if len(name) > 1000 or "://" in name or not parts or not all(map(_is_name, parts)):
        return _media.missing()
    return _media.of_file(file.parent / name)


def _decision(step: JSON, place: str, shots: list[JSON]) -> JSON:
    """What of an agent's step is not conversation."""
    metrics = take(step, "metrics", dict, place) or {}
    made: JSON = {"extra": {key: step[key] for key in _STEP_EXTRA if step.get(key) is not None}}
    if shots:
        made["screenshot"] = shots[-1]
    if (time := take(step, "timestamp", str, place)) is not None:
        made["ts_start"] = time_of(time, f"{place}.timestamp")
    for key, field in (("prompt_token_ids", "prompt_token_ids"), ("completion_token_ids", "response_token_ids")):
        if (ids := take(metrics, key, list, f"{place}.metrics")) is not None:
            if any(type(token) is not int or not 0 <= token < _INT32 for token in ids):
                raise Bad("out_of_range", f"{place}.metrics.{key} holds what is no token id; ids are whole numbers")
            made[field] = tuple(ids)
    if (logprobs := take(metrics, "logprobs", list, f"{place}.metrics")) is not None:
        if any(not is_number(value) or value > 0 for value in logprobs):
            raise Bad("out_of_range", f"{place}.metrics.logprobs holds what is no log-probability (at most 0)")
        if "response_token_ids" in made and len(logprobs) != len(made["response_token_ids"]):
            raise Bad("length_mismatch", f"{place}.metrics has {len(logprobs)} logprobs for another number of tokens")
        made["response_logprobs"] = tuple(map(float, logprobs))
        made["behavior_logprob"] = float(sum(logprobs)) if logprobs else None
    tokens = ("prompt_token_ids", "completion_token_ids", "logprobs")
    if counts := {key: value for key, value in metrics.items() if key not in tokens}:
        made["extra"]["metrics"] = counts
    results = take(take(step, "observation", dict, place) or {}, "results", list, place) or []
    refs = [ref for result in results for ref in take(result, "subagent_trajectory_ref", list, place) or []]
    if refs:
        made["extra"]["subagents"] = refs
    return made


def _subagents(document: Any, file: Path, parent: str, where: JSON) -> Iterator[Episode]:
    for i, child in enumerate(take(document, "subagent_trajectories", list) or []):
        place = f"subagent_trajectories[{i}]"
        name = f"{parent}/{need(child, 'trajectory_id', str, place)}"
        child = child if "schema_version" in child else child | {"schema_version": document["schema_version"]}
        outcome = Outcome()
        outcome.extra["parent"] = parent
        yield _episode([child], file, name, outcome, where)
        yield from _subagents(child, file, name, where)
