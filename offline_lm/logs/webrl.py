"""Rollouts of WebRL and VisualAgentBench's WebArena-Lite, and trajectories of ArCHer and Digi-Q once they are JSON.

A rollout is ``traces/ID.jsonl``, one turn a line (``trace_id, index, prompt, html, image, response, url, target,
parsed_action``), beside ``actions/ID.json`` with its ``score``. After ``process_data.py`` the same turns stand in
``fixed_traces/ID.jsonl`` with ``fixed_response`` and the score **on every line**. It is one outcome all the same: the
last action gets it, the others 0. A score that differs between lines is refused (``reward_conflict``). Where a rollout
stands in both folders, read one of them, ``fixed_traces`` if there: its score may be that of the reward model.

- observation: ``html`` (kind ``html``). Without it the prompt is what the agent saw, if not a placeholder such as
  ``** Simplified html **``.
- action: the last line of the response that is a call, such as ``do(action="Click", element="7")``, ``exit(..)``,
  ``go_backward()``; comments before it (``# Element: ..``) are the thought. ``parsed_action`` null means that it
  could not be carried out.
- The end: ``exit`` is the agent's (``agent_stop``); a rollout that ends otherwise met the limit or an error, and both
  stay null. ``exit(message=..)`` is the final answer.

The other shape is what these projects keep in ``.pt`` files: a trajectory is a list of ``observation, action, reward,
done, next_observation``, with ``trajectory_reward`` and ``mc_return``. WebRL writes the final score as the reward of
every step there, which is recognised by equal rewards that are not 0, over several steps: it is given once. Otherwise
rewards stand as they are. ``mc_return`` is computed from them, and left to be computed again. The last
``next_observation`` is the final observation, unless it repeats the last observation (WebRL writes that one twice).

``.pt`` files themselves are pickles, which may run code: they are refused (``pickle_refused``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offline_lm.logs import _files, _media
from offline_lm.logs._adapters import (
    Sample,
    contents,
    each,
    from_lines,
    give_outcome,
    need,
    numbered,
    rejected,
    take,
    to_json,
)
from offline_lm.logs._files import Record, lines
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Rejected

SOURCE = "webrl"
PICKLES = (".pt", ".pth")
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", *PICKLES)
MAX_TURNS = 10_000
_TURN = frozenset({"trace_id", "index", "response", "target"})
_MOVE = frozenset({"observation", "next_observation", "action", "reward", "done"})
_CALL = re.compile(r"^[ \t]*(\w+)\(", re.MULTILINE)
_KEYWORD = re.compile(r"""\s*(\w+)\s*=\s*("(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+'|[\w.+-]+)\s*(?:,|\Z)""", re.DOTALL)


def detect(sample: Sample) -> str | None:
    if sample.name.endswith(PICKLES) and not sample.is_dir:
        return "a pickle of PyTorch, as WebRL, ArCHer and Digi-Q keep trajectories"
    if sample.is_dir:  # claimed whole, or the scores beside the traces would be logs that nobody knows
        traces = sample.path / "traces"
        if "actions" not in sample.names or not traces.is_dir():
            return None
        first = next((file for file in traces.iterdir() if file.name.endswith(".jsonl")), None)
        return "traces of WebRL beside their actions" if first is not None and detect(Sample(first)) else None
    value = sample.value
    if isinstance(value, list) and value:
        value = value[0]
    keys = value.keys() if isinstance(value, dict) else set()
    if keys >= _TURN:
        return "turns of a WebRL rollout"
    if keys >= _MOVE and keys & {"mc_return", "trajectory_reward"}:
        return "steps with a next_observation and a trajectory_reward"
    return None


def find(path: Path) -> Iterator[Path]:
    """Files of rollouts; of a folder with both, those in fixed_traces and not those in traces."""
    kinds = [path / name for name in ("fixed_traces", "traces")] if path.is_dir() else []
    return _files.find(next((folder for folder in kinds if folder.is_dir()), path), SUFFIXES)


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every rollout of a folder, or those of a file.

    Raises UserError for a folder without such files.
    """
    return (item for file in find(path) for item in _read_file(file))


def _read_file(path: Path) -> Iterator[Episode | Rejected]:
    if path.name.endswith(PICKLES):
        why = (
            "a pickle can run code, so it is not opened; load it with torch.load(path, weights_only=True) and write "
            "each trajectory as one JSON line"
        )
        yield rejected(SOURCE, path, Bad("pickle_refused", why))
        return
    first = next(lines(path), None)
    if isinstance(first, Record) and b'"trace_id"' in first.data:
        yield from_lines(SOURCE, path, _check, lambda turns, sha256: _episode(turns, path, sha256), MAX_TURNS)
    else:
        yield from each(SOURCE, path, lambda value, record: _trajectory(value, record, path))


# --- traces/ID.jsonl ---------------------------------------------------------------------------------------


def _check(turn: Any, number: int) -> None:
    need(turn, "response", str, f"line {number}")


def _episode(turns: list[dict[str, Any]], path: Path, sha256: str) -> Episode:
    steps = [_step(turn, f"line {i}", path) for i, turn in enumerate(turns)]
    name = path.name.split(".")[0]
    root = path.parent.parent if path.parent.name in ("traces", "fixed_traces") else path.parent
    score, extra = _score(turns, root / "actions" / f"{name}.json")
    give_outcome(steps, score)
    last = steps[-1]
    stopped = last.get("action_name") == "exit"
    terminated, truncated = (True, False) if stopped else (None, None)
    last |= {"terminated": terminated, "truncated": truncated}
    answer = last["action_args"].get("message") if stopped else None
    flags = [] if score is not None else ["unlabelled"]
    if all(not step["observation"] for step in steps):
        flags.append("no_observations")
    return Episode(
        source=SOURCE,
        native_id=name,
        dataset=root.name or None,
        steps=numbered(steps),
        benchmark="webarena-lite",
        task_id=name,
        start_url=take(turns[0], "url", str, "line 0"),
        goal=take(turns[0], "target", str, "line 0"),
        policy_kind="llm",
        outcome_reward=score,
        raw_reward=score,
        success=None if score is None else score >= 0.5,  # the rule of WebRL's own processing
        terminated=terminated,
        truncated=truncated,
        end_reason="agent_stop" if stopped else "unknown",
        final_answer=answer,
        uri=str(path),
        sha256=sha256,
        quality_flags=tuple(flags),
        extra=extra,
    )


def _step(turn: dict[str, Any], place: str, path: Path) -> dict[str, Any]:
    response = need(turn, "response", str, place)
    page, prompt = take(turn, "html", str, place), take(turn, "prompt", str, place)
    if page is None and prompt is not None and not prompt.strip().startswith("**"):
        page, kind = prompt, "text"
    else:
        kind = "html" if page is not None else "text"
    step = _action(take(turn, "fixed_response", str, place) or response)
    if "parsed_action" in turn:
        step["action_valid"] = turn["parsed_action"] is not None
    known = _TURN | {"html", "prompt", "url", "image", "offset", "score", "fixed_response"}
    image = take(turn, "image", str, place)
    if image:
        name = image.replace("\\", "/").split("/")[-1]  # the path is one of the machine that made the rollout
        file = path.parent.parent / "screenshots" / name
        step["screenshot"] = _media.of_file(file) if len(name.encode()) < 256 else _media.missing()
    return step | {
        "observation": page or "",
        "observation_kind": kind,
        "url": take(turn, "url", str, place),
        "response": response,
        "source_offset": turn["offset"],
        "extra": {key: item for key, item in turn.items() if key not in known} | {"image": image},
    }


def _action(response: str) -> dict[str, Any]:
    """The command of a response and the words before it."""
    text = response.split("<|eot_id|>")[0].strip()
    step: dict[str, Any] = {"action": text, "action_grammar": "webrl"}
    found = _CALL.search(text) if text.endswith(")") else None
    if found:
        step |= {"action": text[found.start() :].strip(), "action_name": found[1]}
        step |= {"action_args": _arguments(text[found.end() : -1]), "thought": text[: found.start()].strip() or None}
    return step


def _arguments(text: str) -> dict[str, Any]:
    """``action="Click", element="7"`` as an object; under ``arguments`` what is written otherwise."""
    given: dict[str, Any] = {}
    at = 0
    while found := _KEYWORD.match(text, at):
        value = found[2]
        given[found[1]] = value[1:-1] if value[0] in "\"'" else value
        at = found.end()
    return given if at == len(text) else {"arguments": text}


def _score(turns: list[dict[str, Any]], path: Path) -> tuple[float | None, dict[str, Any]]:
    """The one score of a rollout, from its lines or from ``actions/ID.json``, and what else that file says."""
    scores = [take(turn, "score", float, f"line {i}") for i, turn in enumerate(turns)]
    distinct = {score for score in scores if score is not None}
    if len(distinct) > 1:
        raise Bad("reward_conflict", f"the lines have the scores {sorted(distinct)[:5]}; a rollout has one")
    if distinct:
        return distinct.pop(), {}
    if not path.is_file():
        return None, {}
    result = parse(contents(path))
    score = take(result, "score", float, path.name)
    return score, {"actions": {key: item for key, item in result.items() if key != "score"}}


# --- trajectories as lists of moves ------------------------------------------------------------------------


def _trajectory(value: Any, record: Record, path: Path) -> Iterator[Episode]:
    if type(value) is not list:
        raise Bad("wrong_type", "a trajectory is a list of steps; write each as one JSON line")
    if not value:
        raise Bad("no_steps", "the trajectory is empty; leave it out")
    steps: list[dict[str, Any]] = []
    rewards: list[float | None] = []
    for i, move in enumerate(value):
        place = f"[{i}]"
        rewards.append(take(move, "reward", float, place))
        response = need(move, "action", str, place)
        step = _action(response) | {"response": response, "observation": _text(move.get("observation"))}
        step |= {"observation_kind": "text", "source_offset": record.offset}
        if take(move, "done", bool, place) and i + 1 < len(value):
            raise Bad("steps_after_end", f"{place} is done, yet steps follow; split the trajectory")
        known = _MOVE | {"mc_return", "trajectory_reward", "task"}
        steps.append(step | {"extra": {key: item for key, item in move.items() if key not in known}})
    outcome, flags = _rewards(steps, rewards)
    done = take(value[-1], "done", bool, f"[{len(value) - 1}]")
    terminated, truncated = (True, False) if done else (None, None)
    steps[-1] |= {"terminated": terminated, "truncated": truncated}
    after = _text(value[-1].get("next_observation"))
    if after and after != steps[-1]["observation"]:
        steps.append({"observation": after, "observation_kind": "text", "is_final_observation": True})
    total = take(value[-1], "trajectory_reward", float, f"[{len(value) - 1}]")
    yield Episode(
        source=SOURCE,
        native_id=record.sha256[:32],
        dataset=path.name.split(".")[0],
        steps=numbered(steps),
        goal=take(value[0], "task", str, "[0]"),
        policy_kind="llm",
        outcome_reward=outcome,
        raw_reward=total if total is not None else rewards[-1],
        success=None if total is None else total >= 0.5,
        terminated=terminated,
        truncated=truncated,
        end_reason="env_done" if done else "unknown",
        uri=str(path),
        sha256=record.sha256,
        quality_flags=flags,
        extra={"trajectory_reward": total},
    )


def _rewards(steps: list[dict[str, Any]], rewards: list[float | None]) -> tuple[float | None, tuple[str, ...]]:
    """Gives every step its reward; returns the episode's, and quality flags."""
    known = [reward for reward in rewards if reward is not None]
    if not known:
        return None, ("unlabelled",)
    if len(known) == len(rewards) > 1 and len(set(known)) == 1 and known[0] != 0:
        give_outcome(steps, known[0])
        return known[0], ("copied_reward",)
    for step, reward in zip(steps, rewards, strict=True):
        if reward is not None:
            step |= {"reward": reward, "reward_source": "env"}
    if len(known) < len(rewards):
        return None, ("missing_rewards",)
    if not math.isfinite(total := sum(known)):
        raise Bad("json_number", "the sum of the rewards is not finite; log rewards of a reasonable size")
    return total, ()


def _text(value: Any) -> str:
    if isinstance(value, dict) and type(value.get("html")) is str:
        return value["html"]
    return value if type(value) is str else "" if value is None else to_json(value)
