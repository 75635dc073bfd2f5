"""Results of InterCode (Yang et al. 2023): one JSON object, an episode for each of its keys.

An episode holds ``query``, ``turn_history`` (lists of equal length: actions, observations, rewards, valid_action) and
``summary``. Turn t's observation is the answer to action t, so the first step sees only the query.

A turn's reward is the score of the container's state after it, computed anew each turn: not an increment, and never
to be summed. So it is the step's ``progress``, and the step's reward is what it adds to the best score so far
(``reward_source=progress_delta``): the rewards of an episode sum to ``summary.max_reward``, which is its outcome, as
the benchmark counts it, and the final score is not counted twice. A step may therefore earn nothing while ``progress``
falls. ``success`` is max_reward == 1, at which the harness stops (``env_done``); otherwise it stops after ``turns_max``
turns (truncated, ``step_limit``).

``valid_action`` false means that the command failed or that the response held none; what the agent was told of it is
the next observation. Where the harness keeps ``thoughts`` (ReAct), they are the steps' thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.logs import _files
from offline_lm.logs._adapters import Sample, each, need, numbered, rejected, take
from offline_lm.logs._files import Record
from offline_lm.logs._records import Bad
from offline_lm.types import Episode, Rejected

SOURCE = "intercode"
SUFFIXES = (".json", ".json.gz")
_NAME = re.compile(r"[\w./-]+(?=\s|\Z)")
_LISTS = ("actions", "observations", "rewards", "valid_action")


def detect(sample: Sample) -> str | None:
    first = next(iter(sample.value.values()), None) if sample.keys else None
    if isinstance(first, dict) and {"turn_history", "summary", "query"} <= first.keys():
        return "episodes with a turn_history and a summary"
    return None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path, *, model: str | None = None) -> Iterator[Episode | Rejected]:
    """Every episode of a result file, or of those in a folder. `model` names the model; the files do not.

    Raises UserError for a folder without such files.
    """
    return chain.from_iterable(_read_file(file, model) for file in find(path))


def _read_file(path: Path, model: str | None) -> Iterator[Episode | Rejected]:
    return each(SOURCE, path, lambda value, record: _episodes(value, record, path, model))


def _episodes(value: Any, record: Record, path: Path, model: str | None) -> Iterator[Episode | Rejected]:
    if type(value) is not dict:
        raise Bad("not_an_object", "the file is not one JSON object with an episode for each key")
    for index, (key, item) in enumerate(value.items()):
        try:
            yield _episode(key, item, record, path, model)
        except Bad as bad:
            message = f"episode {key[:40]!r}: {bad.message}"
            yield rejected(SOURCE, path, Bad(bad.reason, message), index, sha256=record.sha256)


def _episode(key: str, item: Any, record: Record, path: Path, model: str | None) -> Episode:
    history, summary = need(item, "turn_history", dict), take(item, "summary", dict) or {}
    turns = {name: need(history, name, list, "turn_history") for name in _LISTS}
    thoughts = take(history, "thoughts", list, "turn_history")
    if thoughts is not None:
        turns["thoughts"] = thoughts
    if len({len(turn) for turn in turns.values()}) > 1:
        counts = ", ".join(f"{len(turn)} {name}" for name, turn in turns.items())
        raise Bad("length_mismatch", f"turn_history holds {counts}; log one of each a turn")
    query = need(item, "query", str)
    steps: list[dict[str, Any]] = []
    seen, best = query, 0.0
    for i, values in enumerate(zip(*turns.values(), strict=True)):
        turn = dict(zip(turns, values, strict=True))
        place = f"turn {i}"
        action, score = need(turn, "actions", str, place), take(turn, "rewards", float, place)
        # The reward of a turn without a score is not known; the next score pays for both.
        gain = None if score is None else max(score - best, 0.0)
        best = max(best, score or 0.0)
        answer = turn["observations"]
        steps.append(
            {
                "observation": seen,
                "observation_kind": "text",
                "thought": take(turn, "thoughts", str, place),
                "action": action,
                "action_grammar": "shell" if "bash" in str(item.get("environment")) else "intercode",
                "action_name": found[0] if (found := _NAME.match(action)) else None,
                "action_valid": take(turn, "valid_action", bool, place),
                "reward": gain,
                "reward_source": None if gain is None else "progress_delta",
                "progress": score,
            }
        )
        seen = answer if type(answer) is str else "" if answer is None else str(answer)[:65536]
    if not steps:
        raise Bad("no_steps", "turn_history is empty; leave the episode out")
    outcome = take(summary, "max_reward", float, "summary")
    if outcome is not None and abs(outcome - best) > 1e-9:
        raise Bad("bad_value", f"summary.max_reward is {outcome}, but the best of the turns is {best}; log the same")
    scored = all(step["reward"] is not None for step in steps)
    limit = take(summary, "turns_max", int, "summary")
    end = _end(best, scored, len(steps), limit)
    steps[-1] |= {"terminated": end["terminated"], "truncated": end["truncated"]}
    steps.append({"observation": seen, "observation_kind": "text", "is_final_observation": True})
    environment = take(item, "environment", str) or "intercode"
    dataset = path.name.split(".")[0]
    return Episode(
        source=SOURCE,
        native_id=key,
        dataset=dataset,
        steps=numbered(steps),
        benchmark="intercode",
        task_id=f"{environment}/{_collection(item)}{item.get('task_id', key)}",
        task_family=environment,
        goal=query,
        policy_kind="llm",
        model=model,
        outcome_reward=best if scored else outcome,
        raw_reward=outcome,
        success=best == 1 if scored else None,
        uri=str(path),
        sha256=record.sha256,
        quality_flags=() if scored else ("missing_rewards",),
        extra={"dataset": item.get("dataset"), "summary": summary},
        **end,
    )


def _collection(item: Any) -> str:
    """``nl2bash_fs_1/`` of ``./data/nl2bash/nl2bash_fs_1.json``: task numbers begin anew in each."""
    name = (take(item, "dataset", str) or "").rsplit("/", 1)[-1].removesuffix(".json")
    return f"{name}/" if name else ""


def _end(best: float, scored: bool, count: int, limit: int | None) -> dict[str, Any]:
    if scored and best == 1:
        return {"terminated": True, "truncated": False, "end_reason": "env_done"}
    if limit is not None and count >= limit:
        return {"terminated": False, "truncated": True, "end_reason": "step_limit"}
    return {"terminated": None, "truncated": None, "end_reason": "unknown"}
