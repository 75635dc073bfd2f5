"""Secrets planted in logs, ingested, and looked for in every byte of the store and of what the command printed.

    python analysis/benchmarks/planted_secrets.py [json=true] [planted=500] [seed=0] [redact=default]

Each secret is random and stands at one place, in turn: pages, goals, answers, headers, URLs, typed passwords,
candidates, `extra`, chat messages, names of files, and the same in records that are broken or cut. The logs are
ingested twice with `python -m offline_lm.ingest`, into quarantine and with mode=strict; Parquet files are read column
by column, all other files as they are. Exits with 1 if one secret is found anywhere. With redact=none nearly all are
found, which shows that the search finds what is there.
"""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

LETTERS = string.ascii_letters + string.digits
PAGE = "[11] textbox 'User'\n[12] textbox 'Password', required\n[13] button 'Log in'"
Draw = random.Random


def _random(draw: Draw, n: int, of: str = LETTERS) -> str:
    return "".join(draw.choice(of) for _ in range(n - 1)) + draw.choice(string.digits)


# kind -> (text with {}, length, alphabet)
KINDS: dict[str, tuple[str, int, str]] = {
    "bearer": ("Authorization: Bearer {}", 32, LETTERS),
    "basic": ("Proxy-Authorization: Basic {}", 24, LETTERS),
    "cookie": ("Cookie: theme=dark; sid={}; lang=en", 26, LETTERS),
    "set_cookie": ("Set-Cookie: sid={}; HttpOnly; Path=/", 26, LETTERS),
    "document_cookie": ('document.cookie = "sid={}"', 20, LETTERS),
    "jwt": ("saw eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx{}.c2lnbmF0dXJl here", 30, LETTERS),
    "aws_id": ("key AKIA{} of", 16, string.ascii_uppercase + string.digits),
    "aws_secret": ("aws_secret_access_key = {}", 40, LETTERS),
    "github": ("token ghp_{} in", 36, LETTERS),
    "gitlab": ("glpat-{}", 20, LETTERS),
    "slack": ("xoxb-123456-{}", 24, LETTERS),
    "google": ("AIza{}", 35, LETTERS),
    "openai": ("OPENAI sk-proj-{} end", 40, LETTERS),
    "anthropic": ("sk-ant-api03-{}", 40, LETTERS),
    "huggingface": ("hf_{}", 34, LETTERS),
    "stripe": ("sk_live_{}", 24, LETTERS),
    "twilio": ("SK{}", 32, "0123456789abcdef"),
    "sendgrid": ("SG.abcdefghijklmnopqrstuv.{}", 43, LETTERS),
    "npm": ("npm_{}", 36, LETTERS),
    "pypi": ("pypi-AgEIcHlwaS5vcmc{}", 60, LETTERS),
    "pem": ("-----BEGIN PRIVATE KEY-----\nMIIE{}\n-----END PRIVATE KEY-----", 60, LETTERS),
    "url_password": ("open https://bob:{}@example.org/x", 12, LETTERS),
    "url_query": ("https://example.org/cb?x=1&access_token={}&y=2", 20, LETTERS),
    "signature": ("https://blob.example.org/f?sig={}", 30, LETTERS),
    "api_key": ("api_key = '{}'", 18, LETTERS),
    "secret": ('"client_secret": "{}"', 18, LETTERS),
    "password": ("password: {}", 10, LETTERS),
    "form": ("user=bob&password={}&go=1", 10, LETTERS),
    "said": ('log in with the password "{}"', 10, LETTERS),
}

Episode = dict[str, Any]


def _episode(number: int, **fields: Any) -> Episode:
    step = {"observation": f"page {number}", "action": f"click[{number}]"}
    return {"episode_id": f"e{number}", "task_id": f"t{number}", "steps": [step], "success": True} | fields


def _step(name: str) -> Callable[[int, str], Episode]:
    def make(number: int, text: str) -> Episode:
        value = {
            "candidates": [{"action": text, "response": text}],
            "messages": [{"role": "user", "content": text}, {"role": "tool", "content": json.dumps({"said": text})}],
            "action_args": {"deep": [{"text": text}]},
            "target": {"text": text},
            "extra": {"log": [{"deep": text}]},
        }.get(name, text)
        return _episode(number, steps=[{"observation": f"page {number}", "action": "click[1]", name: value}])

    return make


def _field(name: str) -> Callable[[int, str], Episode]:
    value: Callable[[str], Any] = {
        "extra": lambda text: {"a": [{"b": text}], text: 1},
        "sampling": lambda text: {"note": text},
        "labels": lambda text: [{"kind": "judge", "reason": text}],
    }.get(name, lambda text: text)
    return lambda number, text: _episode(number, **{name: value(text)})


STEP_FIELDS = (
    *("observation", "title", "url", "response", "thought", "action", "action_error", "observation_error"),
    *("candidates", "messages", "action_args", "target", "extra", "unknown_key"),
)
FIELDS = ("goal", "final_answer", "start_url", "task_id", "episode_id", "extra", "sampling", "labels", "unknown_key")
PLACES = {f"step.{name}": _step(name) for name in STEP_FIELDS} | {f"episode.{name}": _field(name) for name in FIELDS}

TYPED: tuple[Callable[[str], dict[str, Any]], ...] = (
    lambda p: {"observation": PAGE, "action": f"fill('12', '{p}')", "thought": f"I type {p}"},
    lambda p: {"observation": PAGE, "action": f"type [12] [{p}] [1]", "response": f"```type [12] [{p}] [1]```"},
    lambda p: {"observation": PAGE, "action": f"Type [12]; {p}"},
    lambda p: {"observation": "x", "action": f'fill(7, "{p}")', "target": {"ref": 7, "tag": "input_password"}},
    lambda p: {
        "observation": "<input type=password bid='12'>",
        "action": f'{{"input_text": {{"index": 12, "text": "{p}"}}}}',
    },
    lambda p: {"observation": PAGE, "action": "x", "action_name": "fill", "action_args": {"bid": "12", "value": p}},
)


def _typed(number: int, password: str) -> Episode:
    step = TYPED[number % len(TYPED)](password)
    after = {"observation": f"textbox value={password}", "action": "done", "candidates": [f"stop {password}"]}
    return _episode(number, goal=f"Sign in as bob, {password}", steps=[step, after], final_answer=f"used {password}")


def _broken(draw: Draw, line: str, secret: str) -> str:
    """A line that no episode can be made of: cut within or after its secret, or with a value of another type."""
    at = line.index(secret[:4])
    how = draw.randrange(4)
    if how == 0:
        return line[: at + len(secret)]
    if how == 1:
        return line[: -draw.randrange(1, 5)]
    if how == 2:
        return json.dumps(json.loads(line) | {"seed": "one"})
    return json.dumps(json.loads(line) | {"steps": []})


def plant(folder: Path, planted: int, seed: int) -> dict[str, str]:
    """Writes logs with `planted` secrets; returns secret -> where it stands."""
    draw = random.Random(seed)
    kinds, places = list(KINDS), list(PLACES)
    where: dict[str, str] = {}
    good, broken, chats = [], [], []
    for i in range(planted):
        kind = kinds[i % len(kinds)]
        form, length, alphabet = KINDS[kind]
        secret = _random(draw, length, alphabet)
        text = form.replace("{}", secret)
        way = i % 10
        if way < 4:
            place = places[(i // 10 * 4 + way) % len(places)]
            good.append(json.dumps(PLACES[place](i, text)))
        elif way < 6:
            secret, place, kind = _random(draw, 10), "typed", "typed"
            good.append(json.dumps(_typed(i, secret)))
        elif way < 8:
            place = places[i // 10 % len(places)]
            broken.append(_broken(draw, json.dumps(PLACES[place](i, text)), secret))
            place = f"broken {place}"
        elif way == 8:
            place = "chat"
            said = [{"role": "user", "content": text}, {"role": "assistant", "content": f"I see {text}"}]
            chats.append(json.dumps({"messages": said, "id": f"c{i}"}))
        else:
            place, kind, secret = "file name", "github", _random(draw, 36)
            name = folder / "named" / f"ghp_{secret}.jsonl"
            name.parent.mkdir(exist_ok=True)
            name.write_text(json.dumps(_episode(i)) + "\n" + '{"steps": [{"obs\n')
        where[secret] = f"{kind} in {place}"
    (folder / "good.jsonl").write_text("\n".join(good))
    (folder / "broken.jsonl").write_text("\n".join(broken))
    (folder / "chats").mkdir()
    (folder / "chats" / "chats.jsonl").write_text("\n".join(chats))
    return where


def ingest(logs: Path, store: Path, *options: str) -> bytes:
    """What the command printed. It may fail: strict mode stops at the first broken record."""
    command = [sys.executable, "-m", "offline_lm.ingest", f"path={logs}", f"store={store}", "json=true", *options]
    run = subprocess.run(command, capture_output=True, check=False)
    if run.returncode not in (0, 2):
        sys.exit(f"{' '.join(command)}: exit code {run.returncode}\n{run.stderr.decode()}")
    return run.stdout + run.stderr


def texts_of(store: Path) -> dict[str, str]:
    """Path -> all of its text."""
    texts = {}
    for path in sorted(store.rglob("*")):
        if path.is_file():
            raw = str(path).encode() + path.read_bytes()
            if path.suffix == ".parquet":
                raw += json.dumps(pq.ParquetFile(path).read().to_pylist(), default=str, ensure_ascii=False).encode()
            texts[str(path.relative_to(store))] = raw.decode("utf-8", "replace")
    return texts


def main() -> int:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    planted, seed = int(options.get("planted", 500)), int(options.get("seed", 0))
    redact = options.get("redact", "default")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        logs = folder / "logs"
        logs.mkdir(parents=True)
        where = plant(logs, planted, seed)
        printed = b""
        parts = [(logs / "good.jsonl", "jsonl"), (logs / "broken.jsonl", "jsonl"), (logs / "chats", "chat")]
        for path, source in [*parts, (logs / "named", "jsonl")]:
            for mode in ("quarantine", "strict"):
                printed += ingest(
                    path, folder / f"store_{mode}", f"source={source}", f"mode={mode}", f"redact={redact}"
                )
        texts = {"(printed)": printed.decode("utf-8", "replace")}
        for mode in ("quarantine", "strict"):
            texts |= {f"{mode}/{name}": text for name, text in texts_of(folder / f"store_{mode}").items()}
        found = {secret: [name for name, text in texts.items() if secret in text] for secret in where}
        found = {secret: names for secret, names in found.items() if names}
        read = Counter()
        for line in printed.decode("utf-8", "replace").splitlines():
            if line.startswith("{"):
                read.update({key: value for key, value in json.loads(line).items() if isinstance(value, int)})
    result = {
        "planted": len(where),
        "found": len(found),
        "read": read["read"],
        "accepted": read["accepted"],
        "duplicates": read["duplicates"],
        "quarantined": read["quarantined"],
        "files": len(texts),
        "where": [f"{where[secret]}: {names[0]}" for secret, names in found.items()][:40],
    }
    if options.get("json") == "true":
        print(json.dumps(result))
    else:
        print("\n".join(f"{key}: {value}" for key, value in result.items()))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
