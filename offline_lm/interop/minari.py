"""Minari: episodes as a dataset folder (HDF5, text spaces), written by Minari itself.

Layout: ``FOLDER/data/{metadata.json, main_data.hdf5}``, so that a folder NAME-v0 under ``MINARI_DATASETS_PATH`` is
``minari.load_dataset("NAME-v0")``; ``minari.MinariDataset("FOLDER/data")`` opens any.

An episode of N actions has N+1 observations, and terminations apart from truncations. Where the log lacks what the
format demands, a stand-in is written, and the command counts it: "" for a final observation (for an observation that
is not text, its messages), NaN for a reward, false for a flag. All else that the store knows is in ``infos``, as JSON
objects: ``infos["step"][t]`` of step t, whose ``not_logged`` names the stand-ins, and ``infos["episode"][0]``. So
`offline_lm.logs.minari` reads back exactly what was written. (An array for each column took three times the space: to
HDF5 every array is an object with chunks of its own.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from offline_lm.errors import UserError
from offline_lm.logs import _exact
from offline_lm.types import Episode, Step

_DATASET_ID = re.compile(r"[-_\w]+-v\d+")
_DEMANDED = ("observation", "action", "reward", "terminated", "truncated")


def filled(episode: Episode) -> list[str]:
    """Columns for which the episode gets a stand-in."""
    found = set()
    for step in episode.steps:
        for name in _DEMANDED[:1] if step.is_final_observation else _DEMANDED:
            if getattr(step, name) is None:
                found.add(f"steps.{name}")
    if not episode.steps[-1].is_final_observation:
        found.add("final_observation")
    return sorted(found)


def write(episodes: Iterable[Episode], folder: Path) -> None:
    """Writes the dataset to `folder`, which must not exist; its name becomes the dataset's id.

    Raises:
        UserError: Minari is not installed.
    """
    try:
        import h5py  # noqa: F401  (what Minari writes with, and does not depend on)
        import minari
        from gymnasium.spaces import Text
        from minari.dataset.minari_storage import MinariStorage
        from minari.serialization import serialize_space
    except ImportError as error:
        raise UserError("format=minari needs the packages: pip install 'offline_lm[minari]'") from error

    folder = folder.absolute()  # Minari 0.5.4 joins a relative one to itself
    folder.mkdir()
    known = {"observation_space": _Seen(), "action_space": _Seen()}
    anything = Text(1)  # the real spaces are known when all is written
    storage = MinariStorage.new(folder / "data", observation_space=anything, action_space=anything)
    storage.update_metadata({"dataset_id": _dataset_id(folder.name), "minari_version": minari.__version__})
    storage.update_episodes(_buffers(episodes, known["observation_space"], known["action_space"]))

    file = folder / "data" / "metadata.json"
    metadata = json.loads(file.read_text(encoding="utf-8"))
    for key, seen in known.items():
        space = Text(max(seen.longest, 1), min_length=0, charset="".join(sorted(seen.characters)) or " ")
        metadata[key] = serialize_space(space)
    file.write_text(json.dumps(metadata), encoding="utf-8")


def _dataset_id(name: str) -> str:
    """The name itself if it is one that Minari takes (NAME-v0), else one made of it."""
    return name if _DATASET_ID.fullmatch(name) else f"{re.sub(r'[^-_a-zA-Z0-9]+', '-', name)}-v0"


class _Seen:
    """What a text space must allow."""

    def __init__(self) -> None:
        self.longest = 0
        self.characters: set[str] = set()

    def text(self, text: str) -> str:
        text = text.replace("\0", "\ufffd")  # HDF5 ends a string there
        self.longest = max(self.longest, len(text))
        self.characters.update(text)
        return text


def _buffers(episodes: Iterable[Episode], seen: _Seen, did: _Seen) -> Iterator[Any]:
    from minari.data_collector import EpisodeBuffer

    for episode in episodes:
        acting = [step for step in episode.steps if not step.is_final_observation]
        final = [step for step in episode.steps if step.is_final_observation]
        observations = [seen.text(_observation(step)) for step in (*acting, *final)] + ([] if final else [""])
        actions = [did.text(step.action if step.action is not None else step.response or "") for step in acting]
        rewards = [math.nan if step.reward is None else step.reward for step in acting]
        terminations = [bool(step.terminated) for step in acting]
        truncations = [bool(step.truncated) for step in acting]
        columns = zip(observations, actions, rewards, terminations, truncations, strict=False)
        shown: list[dict[str, Any]] = [dict(zip(_DEMANDED, values, strict=True)) for values in columns]
        shown += [{"observation": observations[-1], "is_final_observation": True}]
        yield EpisodeBuffer(
            seed=episode.seed,
            observations=observations,
            actions=actions,
            rewards=rewards,
            terminations=terminations,
            truncations=truncations,
            infos=_infos(episode, shown),
        )


def _observation(step: Step) -> str:
    return next((text for text in (step.observation, step.messages, step.observation_error) if text is not None), "")


def _infos(episode: Episode, shown: list[dict[str, Any]]) -> dict[str, Any]:
    """What the arrays alone would not say; `shown` is what they say of each step."""
    value = _exact.write(episode)
    steps = value.pop("steps")
    rest: list[dict[str, Any]] = []
    for t, said in enumerate(shown):
        if t == len(steps):
            rest.append({"not_logged": ["final_observation"]})
            continue
        said = {"step": t, "is_final_observation": False} | said
        differs = {key: item for key, item in steps[t].items() if key not in said or said[key] != item}
        if missing := [key for key in said if key not in steps[t]]:
            differs["not_logged"] = missing
        rest.append(differs)
    return {"step": [_json(item) for item in rest], "episode": [_json(value)]}


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
