"""Minari datasets: the folder ``NAME/data`` with ``metadata.json`` and ``main_data.hdf5``, read with h5py alone.

Layout: a group ``episode_N`` for each episode with ``observations`` (one more than actions: the last is the final
observation), ``actions``, ``rewards``, ``terminations``, ``truncations``, and ``infos``; ``metadata.json`` holds the
spaces. A text space gives text; numbers, arrays, and spaces of several parts become JSON text. Pictures are refused
(``unsupported_space``), and so is ``data_format`` arrow. A reward that is NaN was not logged.

A dataset that `offline_lm.export` wrote holds every other column in ``infos`` (see `offline_lm.interop.minari`), and
gives back the very episodes, source and identity included. Of other datasets ``infos`` go to the steps' ``extra``.

Links to other files, virtual and external data sets are refused (``outside_file``): they would read what nobody named.
A damaged file can send libhdf5 into a loop without end: read files of strangers in a process that may be stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from offline_lm.errors import UserError
from offline_lm.logs import _exact, _files
from offline_lm.logs._adapters import Sample, need, numbered, rejected, take, to_json
from offline_lm.logs._files import TOTAL_BYTES, Damaged
from offline_lm.logs._records import Bad, parse
from offline_lm.types import Episode, Rejected

SOURCE = "minari"
_DATA, _METADATA = "main_data.hdf5", "metadata.json"
_ARRAYS = ("rewards", "terminations", "truncations")
_MAX_ELEMENTS = 1 << 23
_NUMBERS = ("Discrete", "MultiDiscrete", "MultiBinary", "Box")
_H5 = (OSError, KeyError, RuntimeError, ValueError, TypeError)
"""What h5py raises for a file that is damaged."""


def detect(sample: Sample) -> str | None:
    if {_DATA, _METADATA} <= sample.names:
        return f"a folder with {_DATA} and {_METADATA}"
    return None


def find(path: Path) -> Iterator[Path]:
    return _files.find_folders(path, lambda folder: (folder / _DATA).is_file(), f"Minari dataset ({_DATA})")


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every episode of the datasets at or below `path`. The offset of a Rejected is the number of the episode.

    Raises:
        UserError: there is no dataset, or h5py is not installed.
    """
    return chain.from_iterable(_read_folder(folder) for folder in find(path))


def _read_folder(folder: Path) -> Iterator[Episode | Rejected]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise UserError("source=minari needs h5py: pip install 'offline_lm[minari]'") from error
    path = folder / _DATA
    try:
        metadata = _metadata(folder)
        with path.open("rb") as stream, h5py.File(stream, "r") as file:
            block = max(1, TOTAL_BYTES // max(path.stat().st_size, 1))
            for number in _episode_numbers(file):
                try:
                    yield _episode(_Group(file, f"episode_{number}", block), number, metadata, path)
                except Bad as bad:
                    yield rejected(SOURCE, path, bad, number)
    except Bad as bad:
        yield rejected(SOURCE, path, bad)
    except _H5 as error:
        yield rejected(SOURCE, path, _damage(error))


def _damage(error: Exception) -> Bad:
    return Bad("damaged_file", f"HDF5 cannot read it ({str(error).splitlines()[0][:100]}); mend or fetch it again")


def _metadata(folder: Path) -> dict[str, Any]:
    if not (folder / _METADATA).is_file():
        raise Bad("missing_key", f"{_METADATA} is not beside {_DATA}; fetch the whole dataset")
    try:
        data, more = _files.whole(folder / _METADATA)
    except Damaged as damaged:
        raise Bad("damaged_file", f"{_METADATA}: {damaged}") from None
    if more:
        raise Bad("too_large", f"{_METADATA} is longer than {len(data)} bytes")
    value = parse(data)
    if (kind := take(value, "data_format", str, _METADATA) or "hdf5") != "hdf5":
        raise Bad("unsupported_format", f"data_format is {kind[:40]}; write the dataset as hdf5")
    for name in ("observation_space", "action_space"):
        value[name] = parse(need(value, name, str, _METADATA).encode())
    return value


def _episode_numbers(file: Any) -> list[int]:
    found = [name[8:] for name in file if name.startswith("episode_") and name[8:].isdecimal()]
    if not found:
        raise Bad("empty_file", "the file holds no episode; was it written to the end?")
    return sorted(map(int, found))


class _Group:
    """A group of an HDF5 file that follows no link out of it, and reads bounded pieces."""

    def __init__(self, parent: Any, name: str, block: int) -> None:
        self.group, self.block = _inside(parent, name), block
        if not _is_group(self.group):
            raise Bad("wrong_type", f"{name} is no group")

    def __contains__(self, name: str) -> bool:
        return name in self.group

    def below(self, name: str) -> _Group:
        return _Group(self.group, name, self.block)

    def names(self) -> list[str]:
        return list(self.group)

    def is_group(self, name: str) -> bool:
        return _is_group(_inside(self.group, name))

    def values(self, name: str) -> list[Any]:
        """The elements of a data set: text, numbers, or nested lists of numbers."""
        import h5py

        data = _inside(self.group, name)
        if not isinstance(data, h5py.Dataset):
            raise Bad("wrong_type", f"{name} is no data set")
        if data.is_virtual or data.external:
            raise Bad("outside_file", f"{name} lies in another file; write the dataset as one")
        text = data.dtype.kind in "SO"
        if data.ndim < 1 or data.dtype.kind not in "biufSO" or (text and data.ndim > 1):
            raise Bad("wrong_type", f"{name} must be text or numbers, one for each step")
        if (data.size or 0) > _MAX_ELEMENTS:
            raise Bad("too_large", f"{name} has {data.size} elements; at most {_MAX_ELEMENTS} are read")
        return self._texts(data, name) if text else data[()].tolist()

    def _texts(self, data: Any, name: str) -> list[str]:
        """By blocks: many elements may name one long text, but a text is no longer than the file."""
        found: list[str] = []
        total = 0
        for first in range(0, data.shape[0], self.block):
            piece = data[first : first + self.block]
            total += sum(len(item) for item in piece)
            if total > TOTAL_BYTES:
                raise Bad("too_large", f"{name} is longer than {TOTAL_BYTES} bytes")
            found += [_text(item, name) for item in piece]
        return found


def _inside(parent: Any, name: str) -> Any:
    import h5py

    if name not in parent:
        raise Bad("missing_key", f"{name} is missing; it must be there")
    if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
        raise Bad("outside_file", f"{name} is a link; write the dataset without")
    return parent[name]


def _is_group(item: Any) -> bool:
    import h5py

    return isinstance(item, h5py.Group)


def _text(item: Any, name: str) -> str:
    if not isinstance(item, bytes):
        raise Bad("wrong_type", f"{name} holds something other than text and numbers")
    try:
        return item.decode()
    except UnicodeDecodeError:
        raise Bad("invalid_utf8", f"{name} is not UTF-8; re-encode it") from None


def _episode(group: _Group, number: int, metadata: dict[str, Any], path: Path) -> Episode:
    try:
        seen = _decoded(group, "observations", metadata["observation_space"])
        did = _decoded(group, "actions", metadata["action_space"])
        rewards, ends, cuts = (group.values(name) for name in _ARRAYS)
        lengths = {name: len(group_) for name, group_ in (("actions", did), ("rewards", rewards))}
        lengths |= {"terminations": len(ends), "truncations": len(cuts), "observations": len(seen) - 1}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise Bad("length_mismatch", f"the arrays differ in length ({told} and one more); write one a step")
        shown = [
            {
                "observation": _shown(s),
                "action": _shown(a),
                "reward": _reward(r),
                "terminated": bool(e),
                "truncated": bool(c),
            }
            for s, a, r, e, c in zip(seen, did, rewards, ends, cuts, strict=False)
        ]
        shown.append({"observation": _shown(seen[-1]), "is_final_observation": True})
        infos = group.below("infos") if "infos" in group else None
        if infos and "episode" in infos and "step" in infos:
            return _ours(infos, shown)
        seed = group.group.attrs.get("seed")
        extras = _extras(infos, len(shown)) if infos else [{}] * len(shown)
    except _H5 as error:
        raise _damage(error) from None
    known = [reward for reward in (step.get("reward") for step in shown) if reward is not None]
    complete = len(known) == len(did)
    for step, extra in zip(shown, extras, strict=True):
        step |= {"observation_kind": "text", "extra": extra or None}
        if step.get("reward") is not None:
            step["reward_source"] = "env"
    return Episode(
        source=SOURCE,
        native_id=f"episode_{number}",
        dataset=take(metadata, "dataset_id", str, _METADATA) or path.parent.name,
        steps=numbered(shown),
        seed=int(seed) if seed is not None and math.isfinite(seed) else None,
        outcome_reward=math.fsum(known) if complete and known else None,
        terminated=bool(ends[-1]) if ends else None,
        truncated=bool(cuts[-1]) if cuts else None,
        uri=str(path),
        quality_flags=() if complete else ("missing_rewards",) if known else ("unlabelled",),
    )


def _decoded(group: _Group, name: str, space: Any) -> list[Any]:
    """What lies under `name`, an element a step."""
    kind = need(space, "type", str, "space")
    if kind == "Text" or (kind in _NUMBERS and not _is_picture(space)):
        return group.values(name)
    if kind in ("Dict", "Tuple"):
        parts = need(space, "subspaces", (dict, list), "space")
        named = parts.items() if isinstance(parts, dict) else ((f"_index_{i}", part) for i, part in enumerate(parts))
        below = group.below(name)
        columns = {key: _decoded(below, key, part) for key, part in named}
        if len({len(column) for column in columns.values()}) != 1:
            raise Bad("length_mismatch", f"the parts of {name} differ in length")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return rows if kind == "Dict" else [list(row.values()) for row in rows]
    raise Bad("unsupported_space", f"{name} has a space of type {kind[:40]} that is no text and no small array")


def _is_picture(space: dict[str, Any]) -> bool:
    shape = take(space, "shape", list, "space") or []
    return space.get("dtype") == "uint8" and len(shape) in (2, 3) and all(type(n) is int and n >= 32 for n in shape[:2])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def _reward(value: Any) -> float | None:
    if type(value) not in (int, float, bool):
        raise Bad("wrong_type", "rewards must be numbers, one a step")
    return None if math.isnan(value) else float(value)


def _extras(infos: _Group, length: int) -> list[dict[str, Any]]:
    """Infos of each step, where there is one for each observation."""
    extras: list[dict[str, Any]] = [{} for _ in range(length)]
    for name in infos.names():
        values = [] if infos.is_group(name) else infos.values(name)
        if len(values) == length:
            for extra, value in zip(extras, values, strict=True):
                extra[name] = value
    return extras


def _ours(infos: _Group, shown: list[dict[str, Any]]) -> Episode:
    """The episode that `offline_lm.interop.minari` was given: what the arrays do not say stands in ``infos``."""
    value, rest = (_objects(infos, name) for name in ("episode", "step"))
    if len(value) != 1 or len(rest) != len(shown):
        raise Bad("length_mismatch", "infos must hold one episode, and a step for each observation")
    steps = []
    for t, (step, other) in enumerate(zip(shown, rest, strict=True)):
        absent = take(other, "not_logged", list, "infos/step") or []
        if "final_observation" not in absent:
            said = {"step": t} | step | other
            steps.append({key: item for key, item in said.items() if key != "not_logged" and key not in absent})
    return _exact.read(value[0] | {"steps": steps})


def _objects(infos: _Group, name: str) -> list[dict[str, Any]]:
    values = [parse(_shown(text).encode()) for text in infos.values(name)]
    if not all(type(value) is dict for value in values):
        raise Bad("wrong_type", f"infos/{name} must hold JSON objects")
    return values
