"""Minari datasets: the folder ``NAME/data`` with ``metadata.json`` and ``main_data.hdf5``, read with h5py alone.

Layout: a group ``episode_N`` for each episode with ``observations`` (one more than actions: the last is the final
observation), ``actions``, ``rewards``, ``terminations``, ``truncations``, and ``infos``; ``metadata.json`` holds the
spaces. A text space gives text; numbers, arrays, and spaces of several parts become JSON text. Pictures are refused
(``unsupported_space``), and so is ``data_format`` arrow. A reward that is NaN was not logged.

A dataset that `offline_lm.export` wrote holds every other column in ``infos`` (see `offline_lm.interop.minari`), and
gives back the very episodes, source and identity included. Of other datasets ``infos`` go to the steps' ``extra``.

Links to other files, virtual and external data sets are refused (``outside_file``): they would read what nobody named.
A damaged file can send libhdf5 into a loop without end, so a child process reads (`_child`).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import IO, Any

import orjson

from offline_lm.errors import UserError
from offline_lm.logs import _child, _exact, _files
from offline_lm.logs._adapters import Sample, contents, damaged, need, numbered, rejected, take, to_json
from offline_lm.logs._child import Item
from offline_lm.logs._files import TOTAL_BYTES, Damaged, Record, TooLarge
from offline_lm.logs._records import MAX_DEPTH, Bad, parse
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
    if find_spec("h5py") is None:
        raise UserError("source=minari needs h5py: pip install 'offline_lm[minari]'")
    path = folder / _DATA
    try:
        metadata = _metadata(folder)
        for name in ("observation_space", "action_space"):
            _check_space(metadata[name], name)
    except Bad as bad:
        yield rejected(SOURCE, path, bad)
        return
    for item in _child.read(path, read_groups):
        if isinstance(item, Damaged):
            yield damaged(SOURCE, path, item)
            return
        number, bad = (item.offset, None) if isinstance(item, Record) else item
        try:
            if bad is not None:
                raise bad
            assert isinstance(item, Record)
            yield _episode(orjson.loads(item.data), number, metadata, path)
        except Bad as why:
            yield rejected(SOURCE, path, why, number)


def _metadata(folder: Path) -> dict[str, Any]:
    if not (folder / _METADATA).is_file():
        raise Bad("missing_key", f"{_METADATA} is not beside {_DATA}; fetch the whole dataset")
    value = parse(contents(folder / _METADATA))
    if (kind := take(value, "data_format", str, _METADATA) or "hdf5") != "hdf5":
        raise Bad("unsupported_format", f"data_format is {kind[:40]}; write the dataset as hdf5")
    for name in ("observation_space", "action_space"):
        value[name] = parse(need(value, name, str, _METADATA).encode())
    return value


# --- from HDF5 to JSON, in the child -------------------------------------------------------------------------


def read_groups(stream: IO[bytes]) -> Iterator[Item]:
    """Every episode's arrays as JSON: lists, in objects named as the groups are."""
    import h5py

    try:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        with h5py.File(stream, "r") as file:
            block = max(1, TOTAL_BYTES // max(size, 1))
            for number in _episode_numbers(file):
                try:
                    data = orjson.dumps(_arrays(_Group(file, f"episode_{number}", block)))
                    yield Record(number, data, hashlib.sha256(data).hexdigest(), False)
                except Bad as bad:
                    yield number, bad
                except _H5 as error:
                    yield number, _damage(error)
    except Bad as bad:
        yield 0, bad
    except MemoryError:
        yield TooLarge("it needs more memory than it may have; write shorter episodes")
    except _H5 as error:
        yield Damaged(f"HDF5: {_told(error)}")


def _damage(error: Exception) -> Bad:
    return Bad("damaged_file", f"HDF5 cannot read it ({_told(error)}); mend or fetch it again")


def _told(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _episode_numbers(file: Any) -> list[int]:
    found = [name[8:] for name in file if name.startswith("episode_") and name[8:].isdecimal()]
    if not found:
        raise Bad("empty_file", "the file holds no episode; was it written to the end?")
    return sorted(map(int, found))


def _arrays(group: _Group) -> dict[str, Any]:
    found: dict[str, Any] = {name: group.tree(name) for name in ("observations", "actions")}
    found |= {name: group.values(name) for name in _ARRAYS}
    if any(type(reward) is float and math.isinf(reward) for reward in found["rewards"]):
        raise Bad("json_number", "a reward is infinite; write NaN for what was not logged")
    if "infos" in group:
        infos = group.below("infos")
        found["infos"] = {name: infos.values(name) for name in infos.names() if not infos.is_group(name)}
    seed = group.group.attrs.get("seed")
    return found | {"seed": int(seed) if seed is not None and math.isfinite(seed) else None}


class _Group:
    """A group of an HDF5 file that follows no link out of it, and reads bounded pieces."""

    def __init__(self, parent: Any, name: str, block: int, depth: int = 0) -> None:
        self.group, self.block, self.depth = _inside(parent, name), block, depth
        if depth > MAX_DEPTH:
            raise Bad("too_deep", f"groups nested more than {MAX_DEPTH} levels deep; flatten them")
        if not _is_group(self.group):
            raise Bad("wrong_type", f"{name} is no group")

    def __contains__(self, name: str) -> bool:
        return name in self.group

    def below(self, name: str) -> _Group:
        return _Group(self.group, name, self.block, self.depth + 1)

    def names(self) -> list[str]:
        return list(self.group)

    def is_group(self, name: str) -> bool:
        return _is_group(_inside(self.group, name))

    def tree(self, name: str) -> Any:
        """The values of a data set, or those of a group's data sets by their names."""
        if not self.is_group(name):
            return self.values(name)
        below = self.below(name)
        return {inner: below.tree(inner) for inner in below.names()}

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


# --- from JSON to episodes -----------------------------------------------------------------------------------


def _episode(arrays: dict[str, Any], number: int, metadata: dict[str, Any], path: Path) -> Episode:
    seen = _decoded(arrays["observations"], "observations", metadata["observation_space"])
    did = _decoded(arrays["actions"], "actions", metadata["action_space"])
    rewards, ends, cuts = (arrays[name] for name in _ARRAYS)
    lengths = {name: len(values) for name, values in (("actions", did), ("rewards", rewards))}
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
    infos = arrays.get("infos", {})
    if "episode" in infos and "step" in infos:
        return _ours(infos, shown)
    extras = _extras(infos, len(shown))
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
        seed=arrays["seed"],
        outcome_reward=math.fsum(known) if complete and known else None,
        terminated=bool(ends[-1]) if ends else None,
        truncated=bool(cuts[-1]) if cuts else None,
        uri=str(path),
        quality_flags=() if complete else ("missing_rewards",) if known else ("unlabelled",),
    )


def _check_space(space: Any, name: str) -> None:
    """Raises Bad if the space, or a part of it, is one that has no form here."""
    kind = need(space, "type", str, name)
    if kind in ("Dict", "Tuple"):
        for inner, part in _parts(space):
            _check_space(part, f"{name}.{inner}")
    elif kind != "Text" and (kind not in _NUMBERS or _is_picture(space)):
        raise Bad("unsupported_space", f"{name} has a space of type {kind[:40]} that is no text and no small array")


def _parts(space: dict[str, Any]) -> list[tuple[str, Any]]:
    parts = need(space, "subspaces", (dict, list), "space")
    return list(parts.items()) if isinstance(parts, dict) else [(f"_index_{i}", p) for i, p in enumerate(parts)]


def _decoded(values: Any, name: str, space: dict[str, Any]) -> list[Any]:
    """What lies under `name`, an element a step."""
    if space["type"] not in ("Dict", "Tuple"):
        if not isinstance(values, list):
            raise Bad("wrong_type", f"{name} is no data set")
        return values
    if not isinstance(values, dict):
        raise Bad("wrong_type", f"{name} is no group")
    columns = {}
    for key, part in _parts(space):
        if key not in values:
            raise Bad("missing_key", f"{name}/{key} is missing; it must be there")
        columns[key] = _decoded(values[key], f"{name}/{key}", part)
    if len({len(column) for column in columns.values()}) != 1:
        raise Bad("length_mismatch", f"the parts of {name} differ in length")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows if space["type"] == "Dict" else [list(row.values()) for row in rows]


def _is_picture(space: dict[str, Any]) -> bool:
    shape = take(space, "shape", list, "space") or []
    return space.get("dtype") == "uint8" and len(shape) in (2, 3) and all(type(n) is int and n >= 32 for n in shape[:2])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def _reward(value: Any) -> float | None:
    """NaN is null by now, in JSON."""
    if value is not None and type(value) not in (int, float, bool):
        raise Bad("wrong_type", "rewards must be numbers, one a step")
    return None if value is None else float(value)


def _extras(infos: dict[str, list[Any]], length: int) -> list[dict[str, Any]]:
    """Infos of each step, where there is one for each observation."""
    extras: list[dict[str, Any]] = [{} for _ in range(length)]
    for name, values in infos.items():
        if len(values) == length:
            for extra, value in zip(extras, values, strict=True):
                extra[name] = value
    return extras


def _ours(infos: dict[str, list[Any]], shown: list[dict[str, Any]]) -> Episode:
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


def _objects(infos: dict[str, list[Any]], name: str) -> list[dict[str, Any]]:
    values = [parse(_shown(text).encode()) for text in infos[name]]
    if not all(type(value) is dict for value in values):
        raise Bad("wrong_type", f"infos/{name} must hold JSON objects")
    return values
