"""Damages small logs of every format at random and reads them: only episodes and rejected records may come out.

    python analysis/benchmarks/fuzz.py inputs=100000 [seed=0] [json=true]

Each input is one of `samples.py` with one of its files changed: in its bytes (flips, cuts, splices, repetitions), or in
its JSON (values of other types, keys renamed or gone, numbers and nesting beyond all bounds). It goes through
``logs.read`` and, as ``ingest`` does it, through redaction, the store's checks and Arrow; every tenth also to
``source=auto``. A crash is any other exception, or an input that takes longer than `SLOW` seconds; the bytes of the
first of each kind are kept in ``crashes=FOLDER``.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from samples import File, Sample, samples

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.store import Store
from offline_lm.store.ingest import chunks
from offline_lm.store.media import Media
from offline_lm.store.redact import Redactor, default_patterns

SLOW = 20.0

# --- mutations ----------------------------------------------------------------------------------------------


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 0.5, -0.5, 1e308, -1e308),
    *(float("nan"), float("inf"), "", "x", "a b", "0", "-1", "1e999", "NaN", "null", "\x00", "\ud800", "9" * 5000),
    *("2026-99-99", "http://[", "../../etc/passwd", "data:image/png;base64,AAAA", "data:image/png;base64,!"),
    *("é" * 3000, "2026-01-01T00:00:00Z", "2026-01-01 00:00:00.000000"),
    *("[[[[", '{"a":', "<tool_call>", "```", "\n", "assistant", "click(", "${x}", "%s", [], {}, [[]], [None], [{}]),
    *({"": None}, {"a": {"b": []}}, [1, "1", None], [True] * 300, "@40", "@70", "@1100", "@digits"),
)
_WRITTEN = {
    b'"@40"': b'{"a":[' * 20 + b"1" + b"]}" * 20,
    b'"@70"': b'{"a":[' * 35 + b"1" + b"]}" * 35,
    b'"@1100"': b"[" * 1100 + b"]" * 1100,
    b'"@digits"': b"9" * 5000,
}
"""What json.dumps cannot write."""


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        item = todo.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            found.append((item, key))
            todo.append(item[key])
    return found


def _change(rng: random.Random, tree: Any) -> Any:
    places = _places(tree)
    if not places or rng.random() < 0.03:
        return deepcopy(rng.choice(VALUES))
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.6:
        holder[key] = deepcopy(rng.choice(VALUES))
    elif kind < 0.7:
        del holder[key]
    elif kind < 0.8 and isinstance(holder, dict):
        holder[rng.choice(("", "x", str(key).upper(), rng.choice(places)[1]))] = holder.pop(key)
    elif kind < 0.9:
        other, there = rng.choice(places)
        holder[key] = deepcopy(other[there])
    elif isinstance(holder, list):
        holder[:] = deepcopy(rng.choice((holder[::-1], holder * 2, holder[:1] * 40, sorted(holder, key=str))))
    else:
        holder[key] = json.dumps(holder[key])
    return tree


def _in_json(rng: random.Random, data: bytes) -> bytes | None:
    lines = data.split(b"\n")
    which = rng.randrange(len(lines))
    try:
        tree = json.loads(lines[which])
    except ValueError:
        return None
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = _change(rng, tree)
    lines[which] = json.dumps(tree).encode()
    for mark, written in _WRITTEN.items():
        lines[which] = lines[which].replace(mark, written)
    return b"\n".join(lines)


def _in_bytes(rng: random.Random, data: bytes) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, end = sorted(rng.randrange(len(made) + 1) for _ in range(2))
        match rng.randrange(7):
            case 0:
                for _ in range(rng.choice((1, 3, 20))):
                    if made:
                        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
            case 1:
                del made[at:]
            case 2:
                del made[at:end]
            case 3:
                made[at:at] = made[at:end][: 1 << 16]
            case 4:
                made[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
            case 5:
                made[at : at + 8] = rng.choice(
                    (bytes(8), b"\xff" * 8, b'"', b"{", b"]", b"\n", b"\xed\xa0", b"\\ud800")
                )
            case _:
                made[at : at + end - at] = bytes(end - at)
    return bytes(made)


def mutate(rng: random.Random, file: File) -> bytes:
    """The bytes of `file`, damaged before or after they are packed."""
    if file.pack(b"") != b"" and rng.random() < 0.4:
        return _in_bytes(rng, file.pack(file.data))
    made = _in_json(rng, file.data) if rng.random() < 0.7 else None
    return file.pack(_in_bytes(rng, file.data) if made is None else made)


# --- reading ------------------------------------------------------------------------------------------------


class Fuzz:
    """Reads damaged logs and counts what came of them."""

    def __init__(self, folder: Path, seed: int = 0, crashes: Path | None = None) -> None:
        self.rng, self.folder, self.crashes = random.Random(seed), folder, crashes
        self.redactor, self.media = Redactor(default_patterns()), Media(Store.create(folder / "store"), keep=False)
        self.samples, self.formats = samples(), [logs.format_of(name) for name in logs.sources()]
        self.inputs, self.accepted, self.rejected, self.nothing = Counter(), Counter(), Counter(), Counter()
        self.failures: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.slowest = 0.0
        for i, sample in enumerate(self.samples):
            for file in sample.files:
                path = self._path(i, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.pack(file.data))

    def _path(self, i: int, file: File) -> Path:
        return self.folder / f"{i}" / file.name

    def read(self, i: int) -> Iterator[tuple[int, int]]:
        """(episodes, rejected) of each chunk of sample `i` as it lies there."""
        sample = self.samples[i]
        records = logs.read(sample.source, self.folder / f"{i}", **dict(sample.options))
        for chunk in chunks(records, "fuzz", self.redactor, self.media):
            self.reasons.update(one.reason for one in chunk.rejected)
            assert chunk.read == chunk.episodes.num_rows + len(chunk.rejected), "a record was lost"
            yield chunk.episodes.num_rows, len(chunk.rejected)

    def run(self, inputs: int) -> None:
        weights = [sample.weight for sample in self.samples]
        for i in self.rng.choices(range(len(self.samples)), weights, k=inputs):
            sample = self.samples[i]
            file = self.rng.choice(sample.files)
            data = mutate(self.rng, file)
            self._path(i, file).write_bytes(data)
            self._one(i, sample, file, data)
            self._path(i, file).write_bytes(file.pack(file.data))

    def _one(self, i: int, sample: Sample, file: File, data: bytes) -> None:
        self.inputs[sample.source] += 1
        began = time.monotonic()
        try:
            for accepted, rejected in self.read(i):
                self.accepted[sample.source] += accepted
                self.rejected[sample.source] += rejected
            if self.inputs.total() % 10 == 0:
                self._recognise(self._path(i, file))
        except UserError as error:
            if "holds no" not in str(error):
                self._failed(f"{sample.source}: UserError: {error}"[:120], file, data)
            self.nothing[sample.source] += 1
        except Exception as error:  # the very thing that is looked for
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "offline_lm" in f.filename][-1:] or frames[-1:]
            where = f"{Path(ours[0].filename).name}:{ours[0].lineno}"
            self._failed(f"{sample.source}: {type(error).__name__} at {where}: {str(error)[:80]}", file, data)
        took = time.monotonic() - began
        if took > SLOW:
            self._failed(f"{sample.source}: slow", file, data)
        self.slowest = max(self.slowest, took)

    def _recognise(self, path: Path) -> None:
        """What source=auto does first; it may say that two formats claim the file."""
        try:
            logs.recognise(logs.Sample(path), self.formats)
        except UserError as error:
            if "more than one format" not in str(error):
                raise

    def _failed(self, what: str, file: File, data: bytes) -> None:
        self.failures[what] += 1
        if self.crashes is not None and self.failures[what] == 1:
            self.crashes.mkdir(parents=True, exist_ok=True)
            (self.crashes / f"{len(self.failures)}_{Path(file.name).name}").write_bytes(data)


def peak_memory_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform == "linux" else 1 << 20))


def main() -> int:
    given = dict(arg.split("=", 1) for arg in sys.argv[1:])
    inputs = int(given.get("inputs", 100_000))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), int(given.get("seed", 0)), Path(given["crashes"]) if "crashes" in given else None)
        while (done := fuzz.inputs.total()) < inputs:
            fuzz.run(min(1000, inputs - done))
            if given.get("json") != "true":
                print(f"{fuzz.inputs.total()} inputs, {fuzz.failures.total()} crashes", file=sys.stderr)
    told = {
        "inputs": fuzz.inputs.total(),
        "crashes": fuzz.failures.total(),
        "kinds": dict(fuzz.failures.most_common()),
        "formats": dict(sorted(fuzz.inputs.items())),
        "accepted": fuzz.accepted.total(),
        "rejected": fuzz.rejected.total(),
        "nothing_found": fuzz.nothing.total(),
        "reasons": dict(fuzz.reasons.most_common()),
        "slowest_seconds": round(fuzz.slowest, 2),
        "peak_memory_mb": peak_memory_mb(),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(told, indent=None if given.get("json") == "true" else 2))
    return 1 if told["crashes"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
