"""What the store makes of a log must not change with how fast it makes it: duplicates are found by these digests.

`PINNED` was written by the code before its first fast path. A digest that changes on purpose (a new column, say) needs
a plan for the stores that hold the old one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path

import orjson
import pytest

from offline_lm import logs
from offline_lm.store import Store
from offline_lm.store.ingest import chunks
from offline_lm.store.media import Media
from offline_lm.store.redact import Redactor

PINNED = json.loads(Path(__file__).with_name("pinned.json").read_text("utf-8"))
BENCHMARKS = Path(__file__).resolve().parents[2] / "analysis" / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of analysis/benchmarks, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def digests(source: str, path: Path, options: dict, store: Path) -> list[str]:
    """The content hashes of a log, then a digest of all its rows, rejected records and counts."""
    hashes, everything = [], hashlib.sha256()
    media = Media(Store.create(store), keep=False)
    redactor = Redactor.default()
    redactor.prefilter.least = 0
    for chunk in chunks(logs.read(source, path, **options), "i", redactor, media):
        hashes += chunk.episodes["content_hash"].to_pylist()
        told = [chunk.episodes.to_pylist(), chunk.steps.to_pylist(), chunk.rejected, sorted(chunk.redacted.items())]
        everything.update(repr(told).encode("utf-8", "backslashreplace"))
    return [*hashes, everything.hexdigest()]


@pytest.mark.parametrize("name", ["jsonl", "chat", "browser_use", "miniwob_demos", "adp"])
def test_the_generated_logs_of_the_benchmark(name, benchmarks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benchmarks("_web_logs").write(Path("made", name), name, 600_000, seed=7)
    assert digests(name, Path("made", name), {}, tmp_path / "store") == PINNED["generated"][name]


def test_a_sample_of_every_format(benchmarks, tmp_path, monkeypatch):
    pytest.importorskip("datasets")  # it writes one of the samples
    monkeypatch.chdir(tmp_path)
    found = {}
    for i, sample in enumerate(benchmarks("samples").samples()):
        if sample.source in ("hf_datasets", "minari", "agentlab"):
            continue  # binary files that hold the version of their writer
        for file in sample.files:
            path = Path("made", str(i), file.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data if "zip" not in file.name else file.pack(file.data))
        if any(name in file.name for file in sample.files for name in (".gz", "zip", ".parquet")):
            continue  # compressed bytes, whose hash is the library's
        found[f"{i} {sample.source}"] = digests(
            sample.source, Path("made", str(i)), dict(sample.options), tmp_path / "s"
        )
    assert found == PINNED["samples"]


SECRETS = (
    "password: hunter2secret",
    "Authorization: Bearer abcdef0123456789abcdef",
    "Cookie: sid=abc123def456ghi7; theme=dark",
    "https://u:p4ssw0rd@h.com/x?token=abcd1234efgh",
    "sk-proj-abcdefghijklmnopqrstuv",
    "AKIAABCDEFGHIJKLMNOP",
    "eyJhbGciOi.eyJzdWIiOi.abc",
    'api_key="abcd1234efgh5678"',
    'my password is "tr0ub4dor"',
    "\tsecret_key = abcdefghij01234",
    '<input type="password" value="xyzzy123">',
    "-----BEGIN PRIVATE KEY-----abcdefg-----END",
    "basic QWxhZGRpbjpvcGVuIHNlc2E=",
    "a desk-lamp in the basket, asked for cookie settings",
    "eos_token max_tokens",
    "\x1b[31mpassword=hunter3secret",
)
"""Texts with and without a secret."""


def test_secrets_in_every_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    episodes = []
    for i, secret in enumerate(SECRETS):
        step = {"observation": "[1] textbox 'Password'\n[2] button 'Buy'", "action": "click[2]", "reward": 0}
        places = [
            {"observation": secret}, {"response": secret}, {"thought": secret}, {"url": secret}, {"title": secret},
            {"action": f'type [1] [pw{i}x9]\nclick("{secret}")'}, {"action_args": {"text": secret, "n": 1}},
            {"extra": {"token": secret, "headers": [{"name": "Cookie", "value": secret}], "deep": [[secret]]}},
            {"messages": [{"role": "user", "content": secret}]}, {"target": {"ref": "1", "text": secret}},
            {"candidates": [{"action": secret}, {"action": "x", "response": secret}]}, {"action_error": secret},
            {"sub_actions": ["cookie", secret]}, {"prompt_token_ids": [1, 2]},
        ]  # fmt: skip
        shared = {"goal": f"g{i}", "success": True}
        for j, place in enumerate(places):
            name = {"task_id": f"{i}.{j}", "native_id": f"{i}.{j}"}
            episodes.append({**name, **shared, "steps": [step, step | place, step | {"title": f"{i}"}]})
        last = {"task_id": secret, "goal": secret, "success": i % 2 > 0, "final_answer": secret}
        episodes.append({**last, "steps": [step]})
    Path("made.jsonl").write_bytes(b"\n".join(map(orjson.dumps, episodes)))
    assert digests("jsonl", Path("made.jsonl"), {}, tmp_path / "store") == PINNED["secrets"]
