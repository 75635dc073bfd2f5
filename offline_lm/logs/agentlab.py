"""Results of AgentLab and BrowserGym (``browsergym/experiments/loop.py``): a folder for each episode.

A folder holds ``exp_args.pkl`` (agent, model, task, seed), ``step_N.pkl.gz`` (a StepInfo each), the goal
(``goal_object.pkl.gz``), ``summary_info.json`` and ``screenshot_step_N.png``. Most of it is pickles, which can run
code when Python loads them; they are read only with ``allow_pickle=true``, and then by `_pickle`, which runs none.

- Off by one: step N carries the page and the action chosen on it, but the reward, the flags and the error of the
  action before. They are moved to the action that earned them.
- The last step of an episode that ended has no action: its page is the final observation.
- A step without an action that the agent was asked for ends the episode as ``truncated`` (its answer could not be
  parsed, or it gave up): it is kept with its response, ``action_valid=False``, and earns 0 where the total is logged.
- A crash leaves ``err_msg`` in the summary and neither flag: ``env_error`` where the page after an action is missing,
  else ``agent_error``. What the last action earned is then unknown, unless the page after it was logged.
- An episode that was killed has no summary: ``end_reason=unknown`` and the quality flag ``unfinished``.

The observation is the accessibility tree (``axtree_txt``), else ``pruned_html``, else ``dom_txt``; the raw DOM that
these were made from is left out. ``response`` is the last reply of ``chat_messages``, earlier ones that could not be
parsed are in ``extra.retries``; ``messages=true`` keeps the prompt too. Success is a total reward of 1 or more.
A folder whose name begins with ``_`` is a run that AgentLab repeated: it has the quality flag ``superseded``. A
folder with a summary and no steps is rejected as ``outcome_only``. Files of the study around the folders are not read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offline_lm.errors import UserError
from offline_lm.logs import _files, _media
from offline_lm.logs._adapters import Sample, contents, need, numbered, rejected, take, to_json
from offline_lm.logs._browsergym import (
    answer,
    conversation,
    cost_of,
    parsed,
    raw_reward,
    task_of,
    time_of,
    was_asked,
)
from offline_lm.logs._chat import content_text
from offline_lm.logs._pickle import Record, load, to_plain
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Rejected

SOURCE = "agentlab"
VIEWS = {"axtree_txt": "axtree", "pruned_html": "html", "dom_txt": "dom"}
_STEP = re.compile(r"step_(\d{1,9})\.pkl\.gz\Z")
_RAW = ("dom_object", "axtree_object", "extra_element_properties", "screenshot", "screenshot_som")
_EXTRA = ("focused_element_bid", "elapsed_time", "open_pages_urls", "open_pages_titles", "active_page_index")


def detect(sample: Sample) -> str | None:
    if "study.pkl.gz" in sample.names and any(map(_is_run, sample.path.iterdir())):  # a study may hold none yet
        return "a study.pkl.gz beside its episodes"
    return "exp_args.pkl or step_N.pkl.gz in a folder" if _is_episode(sample.names) else None


def find(path: Path) -> Iterator[Path]:
    return _files.find_folders(path, lambda folder: _is_episode(_names(folder)), "folder with exp_args.pkl")


def read(
    path: Path,
    *,
    allow_pickle: bool = False,
    observation: str = "axtree_txt",
    messages: bool = False,
    dataset: str | None = None,
) -> Iterator[Episode | Rejected]:
    """Every episode folder at or below `path`: one Episode or one Rejected for each.

    Args:
        allow_pickle: Read the pickles, without running them. Otherwise each folder is rejected (``pickle_refused``).
        observation: The view to take where it was logged: axtree_txt, pruned_html or dom_txt.
        messages: Also keep the prompt of each step.
        dataset: Name of the collection; by default the folder around the episode's.

    Raises:
        UserError: no folder holds an episode, an unknown `observation`.
    """
    if observation not in VIEWS:
        raise UserError(f"options.observation={observation} is not a view; take one of: {', '.join(VIEWS)}")
    views = (observation, *(view for view in VIEWS if view != observation))
    for folder in find(path):
        reader = _Folder(folder, views, messages)
        try:
            yield reader.episode(dataset, allow_pickle)
        except Bad as bad:
            yield rejected(SOURCE, folder, bad, sha256=reader.sha256)


def _names(folder: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in folder.iterdir())


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and (folder / "exp_args.pkl").is_file()


def _is_episode(names: frozenset[str]) -> bool:
    return "exp_args.pkl" in names or any(map(_STEP.match, names))


class _Folder:
    """Reads the files of one episode; `sha256` is that of all bytes read so far."""

    def __init__(self, folder: Path, views: tuple[str, ...], prompts: bool) -> None:
        self.folder = folder
        self.names = _names(folder)
        self.views = views
        self.prompts = prompts
        self.digest: Any = None

    @property
    def sha256(self) -> str | None:
        return self.digest.hexdigest() if self.digest else None

    # files

    def bytes_of(self, name: str) -> bytes:
        data = contents(self.folder / name)
        self.digest = self.digest or hashlib.sha256()
        self.digest.update(f"{name} {len(data)}\n".encode() + data)
        return data

    def pickled(self, name: str) -> Any:
        try:
            return load(self.bytes_of(name))
        except Bad as bad:
            raise Bad(bad.reason, f"{name}: {bad.message}") from None

    def summary(self) -> dict[str, Any]:
        """summary_info.json; empty where the episode was killed before it was written, or while."""
        if "summary_info.json" not in self.names:
            return {}
        data = self.bytes_of("summary_info.json")
        summary = parse(data, refuse_duplicates=False) if data.strip() else {}
        if type(summary) is not dict:
            raise Bad("not_an_object", "summary_info.json holds no object")
        return summary

    def numbers(self) -> list[str]:
        """Names of the step files, in order. Raises Bad if one is missing or there twice."""
        files = sorted((int(match[1]), name) for name in self.names if (match := _STEP.match(name)))
        for i, (number, name) in enumerate(files):
            if i and number == files[i - 1][0]:
                raise Bad("duplicate_step", f"{name} and {files[i - 1][1]} are both step {number}; keep one")
            if number != i:
                raise Bad("missing_steps", f"step_{i}.pkl.gz is missing, {name} is there; fetch the folder again")
        return [name for _, name in files]

    def info(self, name: str, number: int) -> dict[str, Any]:
        """A StepInfo as plain values, without what is large and not kept."""
        record = self.pickled(name)
        if not isinstance(record, Record):
            raise Bad("wrong_type", f"{name} holds no StepInfo")
        if isinstance(obs := record.attributes.get("obs"), dict):
            record.attributes["obs"] = {key: value for key, value in obs.items() if key not in _RAW}
        info = to_plain(record)
        if need(info, "step", int, name) != number:
            raise Bad("step_mismatch", f"{name} says that it is step {info['step']}; files were mixed")
        return info

    # the episode

    def episode(self, dataset: str | None, allow_pickle: bool) -> Episode:
        files = self.numbers()
        summary = self.summary()
        if not files and take(summary, "n_steps", int, "summary_info.json"):
            raise Bad("outcome_only", "the folder has a summary and no steps; give the outcome to a run with labels=")
        if not files:
            raise Bad("no_steps", "the folder has no step_N.pkl.gz: the run did not begin; leave it out")
        if not allow_pickle:
            raise Bad("pickle_refused", "the steps are pickles; read them, without running them, with "
                      "+options.allow_pickle=true")  # fmt: skip
        infos = [self.info(name, i) for i, name in enumerate(files)]
        _check_end(infos, summary)
        args = to_plain(self.pickled("exp_args.pkl")) if "exp_args.pkl" in self.names else {}
        task = task_of(args, self.folder.name)
        steps = [self.step(info, infos[i + 1] if i + 1 < len(infos) else None, task) for i, info in enumerate(infos)]
        end = _end(infos, steps, summary)
        steps = [step for step in steps if step is not None]
        flags = end.pop("quality_flags")
        if self.folder.name.startswith("_"):
            flags.append("superseded")
        if all(step["observation"] == "" for step in steps):
            flags.append("no_observations")
        extra: dict[str, Any] = {"summary": summary} if summary else {}
        if "class" in args:
            extra["exp_args"] = args
        return Episode(
            source=SOURCE,
            native_id=self.folder.name,
            dataset=dataset or self.folder.parent.name,
            goal=self.goal(infos[0]),
            start_url=steps[0].get("url"),
            steps=numbered(steps),
            policy_kind="llm",
            uri=str(self.folder),
            sha256=self.sha256,
            quality_flags=tuple(flags),
            extra=extra,
            **{key: value for key, value in task.items() if key != "screenshots"},
            **cost_of(infos, summary),
            **end,
        )

    def goal(self, first: dict[str, Any]) -> str | None:
        obs = take(first, "obs", dict, "step 0") or {}
        goal = obs.get("goal_object") or obs.get("goal")
        if obs.get("goal_object") is None and "goal_object.pkl.gz" in self.names:
            goal = to_plain(self.pickled("goal_object.pkl.gz"))
        return content_text(goal, "goal_object")[0] or None

    def step(self, info: dict[str, Any], after: dict[str, Any] | None, task: dict[str, Any]) -> dict[str, Any] | None:
        """Fields of the step that saw `info`, with the outcome that `after` logged; None if there was no page."""
        place = f"step {info['step']}"
        obs = take(info, "obs", dict, place)
        if obs is None:
            return None
        view = next((view for view in self.views if type(obs.get(view)) is str), None)
        step: dict[str, Any] = {
            "observation": "" if view is None else obs[view],
            "observation_kind": "text" if view is None else VIEWS[view],
            "url": take(obs, "url", str, place),
            "title": _title(obs),
            "screenshot": self.screenshot(info["step"], task["screenshots"]),
            "extra": {key: obs[key] for key in _EXTRA if obs.get(key) not in (None, "", [])},
        }
        action = take(info, "action", str, place)
        if action is None and not was_asked(info):
            return step | {"is_final_observation": True}
        return step | _decision(info, action, step, self.prompts) | _outcome(info, after)

    def screenshot(self, number: int, expected: bool) -> dict[str, Any] | None:
        for suffix in ("png", "jpg"):
            if (name := f"screenshot_step_{number}.{suffix}") in self.names:
                return _media.of_file(self.folder / name)
        return _media.missing() if expected else None


# --- one step -----------------------------------------------------------------------------------------------


def _title(obs: dict[str, Any]) -> str | None:
    titles, active = obs.get("open_pages_titles"), obs.get("active_page_index")
    at = active[0] if type(active) is list and active else active
    if type(titles) is list and type(at) is int and 0 <= at < len(titles) and type(titles[at]) is str:
        return titles[at]
    return None


def _decision(info: dict[str, Any], action: str | None, step: dict[str, Any], prompts: bool) -> dict[str, Any]:
    place = f"step {info['step']}"
    agent = take(info, "agent_info", dict, place) or {}
    prompt, replies = conversation(agent.get("chat_messages"), f"{place}.agent_info.chat_messages")
    extra = step["extra"] | {"stats": info["stats"]} if info.get("stats") else step["extra"]
    extra |= {key: agent[key] for key in ("extra_info", "err_msg", "stack_trace") if agent.get(key)}
    if len(replies) > 1:
        extra["retries"] = replies[:-1]
    fields: dict[str, Any] = {
        "response": replies[-1] if replies else None,
        "thought": take(agent, "think", str, f"{place}.agent_info") or None,
        "action": action,
        "action_grammar": "browsergym",
        "ts_start": time_of(info, "agent_start"),
        "ts_end": time_of(info, "agent_stop"),
        "extra": extra,
    }
    if prompts and prompt:
        fields["messages"] = to_json(prompt)
    if action is None:
        return fields | {"action": None if replies else "", "action_valid": False}
    return fields | parsed(action, step["observation"])


def _outcome(info: dict[str, Any], after: dict[str, Any] | None) -> dict[str, Any]:
    """What the action earned, from the step after it; nothing where that was not logged."""
    if after is None:
        return {}
    place = f"step {after['step']}"
    obs = take(after, "obs", dict, place)
    if obs is None:
        return {}  # the environment crashed: what stands there are the defaults of StepInfo
    error = take(obs, "last_action_error", str, place)
    truncated = take(after, "truncated", bool, place)
    if was_asked(after) and take(after, "action", str, place) is None:
        truncated = False  # set because that step has no action, and kept there
    fields: dict[str, Any] = {
        "reward": take(after, "reward", float, place),
        "reward_source": "env",
        "terminated": take(after, "terminated", bool, place),
        "truncated": truncated,
        "ts_end": time_of(after, "env_stop"),
        "action_error": error or None,
    }
    if error is not None:
        fields["action_valid"] = not error
    return fields


# --- the episode --------------------------------------------------------------------------------------------


def _check_end(infos: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    for i, info in enumerate(infos[:-1]):
        if info.get("terminated") or info.get("truncated"):
            raise Bad("steps_after_end", f"step {i} ends the episode, and step {i + 1} follows it; files were mixed")
        if info.get("obs") is None:
            raise Bad("missing_key", f"step {i} has no obs, and is not the last")
        if info.get("action") is None:
            raise Bad("missing_key", f"step {i} has no action, and is not the last")
    logged = take(summary, "n_steps", int, "summary_info.json")
    crashed = summary.get("err_msg") is not None
    if logged is None or len(infos) == logged + 1 or (crashed and len(infos) == logged):
        return
    if len(infos) <= logged:
        raise Bad("missing_steps", f"{len(infos)} step files, and summary_info.json counts {logged + 1}; fetch them")
    raise Bad("length_mismatch", f"{len(infos)} step files, and summary_info.json counts {logged + 1}; two runs?")


def _end(infos: list[dict[str, Any]], steps: list[dict[str, Any] | None], summary: dict[str, Any]) -> dict[str, Any]:
    """How the episode ended, and with what; completes the last acting step where the agent gave up."""
    flags: list[str] = []
    acting = [step for step in steps if step is not None and not step.get("is_final_observation")]
    if not acting:
        raise Bad("no_steps", f"no action was taken: {str(summary.get('err_msg') or 'the run was stopped')[:200]}")
    last, place = acting[-1], "summary_info.json"
    error = take(summary, "err_msg", str, place)
    total = take(summary, "cum_reward", float, place)
    gave_up = was_asked(infos[-1]) and infos[-1].get("action") is None
    if gave_up:
        last |= {"terminated": False, "truncated": True}
        if total is not None:
            last |= {"reward": 0.0, "reward_source": "env"}
    terminated, truncated = last.get("terminated"), last.get("truncated")
    if gave_up:
        stats = infos[-1]["stats"]
        reason = "agent_error" if error or stats.get("busted_retry") else "agent_stop"
    elif terminated or truncated:
        reason = "env_done" if terminated else "step_limit"
    elif error is not None and steps[-1] is None:
        reason = "env_error"
        last["action_error"] = error
    else:
        reason = "unknown" if error is None or steps[-1] is last else "agent_error"
    if error is None and not summary:
        flags.append("unfinished")
    rewards = [step.get("reward") for step in acting]
    known = [reward for reward in rewards if reward is not None]
    finished = bool(terminated or truncated)
    if total is None and finished and len(known) == len(rewards):
        total = math.fsum(known)
    elif total is not None and abs(total - math.fsum(known)) > 1e-6:
        flags.append("reward_mismatch")
    return {
        "outcome_reward": total if finished else None,
        "raw_reward": raw_reward(infos[-1]) if finished else None,
        "success": total >= 1 if finished and total is not None else None,
        "terminated": terminated,
        "truncated": truncated,
        "end_reason": reason,
        "final_answer": answer(last.get("action_name"), last.get("action_args")),
        "quality_flags": flags,
    }
