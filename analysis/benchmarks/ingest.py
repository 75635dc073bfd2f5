"""`python -m offline_lm.ingest` beside plain reading and parsing of the same logs, and the memory that it takes.

    python analysis/benchmarks/ingest.py [json=true] [size_mb=40] [repeats=3] [workers=1] [formats=jsonl,chat,...]
    python analysis/benchmarks/ingest.py big=10 [workers=2]

The logs are made here, in the shapes of five formats and with random contents, so that no episode is a duplicate:

    jsonl          8 to 16 steps, each with a page of 14 KB as an accessibility tree
    chat           OpenAI messages: a system prompt of 6 KB, 8 to 16 tool calls with results of some KB
    browser_use    a history for each episode: items of the page, selectors, results, elements acted on
    miniwob_demos  a demonstration for each episode: 20 to 60 states of the page, four in five DOM events a click's half
    adp            8 to 16 steps, web pages of 14 KB and calls

One page in three ends in "Cookie settings · Sign in" and one episode in ten passes a login form with a typed password,
so that redaction has what it has in real logs. Every repeat runs, one format after the other, the peer and ours:

    peer   the bytes of each record read and given to `orjson.loads`, in this process
    ours   the ingest command in a process of its own: `seconds` of its report, from the first byte read to the last
           commit on the disk; starting Python (a second or two) is not counted

and medians are compared. `ratio` is peer / ours, how many times longer ingesting takes than parsing. CPU is user and
system time of the command, imports included. Memory is the peak of the resident sizes of the command's process and its
children together, sampled every 20 ms; what they share is counted in each.

``big=GB`` writes one file of jsonl of that size and ingests it, for "10 GB of logs go through 2 GB of memory".
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import orjson

Draw = random.Random
JSON = dict[str, Any]

WORDS = (
    "red blue oak steel lamp mug chair desk coffee winter summer travel garden kitchen office leather cotton price "
    "order return cart review rating ships free today tomorrow store account list compare details size colour small "
    "large medium in of for with and the a new best sale top seller guide help contact about terms privacy café menü "
    "search filter sort by newest oldest page next previous home back results items per view all more less show"
).split()
ROLES = ("link", "button", "StaticText", "heading", "listitem", "textbox", "checkbox", "img", "generic")
FOOTER = "[{n}] link 'Privacy policy'\n[{m}] link 'Cookie settings'\n[{k}] link 'Sign in', url='https://{host}/account'"
FORM = "[901] textbox 'User name', required\n[902] textbox 'Password', required\n[903] button 'Log in', clickable"


# --- contents -----------------------------------------------------------------------------------------------


def words(draw: Draw, low: int, high: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


class Pages:
    """Accessibility trees of about `size` bytes, from a stock of lines."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.refs = range(1)
        """of the last page"""
        kinds = draw.choices(ROLES, k=4000)
        self.lines = ["\t" * draw.randint(1, 5) + f"[%d] {kind} '{words(draw, 1, 9)}', visible" for kind in kinds]

    def page(self, size: int, *, login: bool = False) -> str:
        draw = self.draw
        host = f"shop{draw.randrange(100)}.example.org"
        lines = [f"RootWebArea '{words(draw, 2, 5)}', focused, url='https://{host}/{draw.getrandbits(48):x}'"]
        first, length = draw.randint(1, 4000), 0
        while length < size:
            picked = draw.choices(self.lines, k=50)
            lines += [line % (first + i) for i, line in enumerate(picked, len(lines))]
            length += sum(map(len, picked))
        self.refs = range(first + 1, first + len(lines))
        if login:
            lines.append(FORM)
        if draw.random() < 1 / 3:
            lines.append(FOOTER.format(n=first + 900, m=first + 901, k=first + 902, host=host))
        return "\n".join(lines)


def action(pages: Pages, i: int, login: int) -> tuple[str, JSON]:
    """Name and arguments, on the last page; at the step `login` the password is typed."""
    draw = pages.draw
    if i == login:
        return "fill", {"bid": "902", "value": f"pw{draw.getrandbits(40):x}"}
    bid = str(draw.choice(pages.refs))
    if draw.random() < 0.2:
        return "fill", {"bid": bid, "value": words(draw, 1, 4)}
    return "click", {"bid": bid}


def _steps(draw: Draw) -> tuple[int, int]:
    """(number of steps, the one that types a password or -1)"""
    steps = draw.randint(8, 16)
    return steps, draw.randrange(steps) if draw.random() < 0.1 else -1


def jsonl(draw: Draw, pages: Pages, number: int) -> JSON:
    length, login = _steps(draw)
    steps = []
    for i in range(length):
        page = pages.page(14_000, login=i == login)
        name, args = action(pages, i, login)
        text = f"{name}({', '.join(repr(item) for item in args.values())})"
        steps.append({
            "url": f"https://shop.example.org/{draw.getrandbits(32):x}", "title": words(draw, 2, 5),
            "observation": page, "observation_kind": "axtree",
            "response": f"<think>{words(draw, 30, 90)}</think>\n{text}", "thought": words(draw, 30, 90),
            "action": text, "action_name": name, "action_args": args, "reward": float(i == length - 1),
        })  # fmt: skip
    return {
        "native_id": f"e{number}", "task_id": f"shop/{number % 997}", "goal": words(draw, 8, 20), "model": "m-7b",
        "trial": number // 997, "success": True, "terminated": True, "steps": steps,
    }  # fmt: skip


def chat(draw: Draw, pages: Pages, number: int) -> JSON:
    length, login = _steps(draw)
    system = f"# Policy\n{' '.join(WORDS * 9)}\nToday is day {draw.randrange(1000)}."
    messages: list[JSON] = [{"role": "system", "content": system}, {"role": "user", "content": words(draw, 20, 60)}]
    for i in range(length):
        name, args = action(pages, i, login)
        call = {"name": name, "arguments": json.dumps(args)}
        tool = {"id": f"call_{draw.getrandbits(64):x}", "type": "function", "function": call}
        result = pages.page(draw.randint(500, 6000), login=i + 1 == login)
        messages += [
            {"role": "assistant", "content": words(draw, 10, 50), "tool_calls": [tool]},
            {"role": "tool", "tool_call_id": tool["id"], "name": name, "content": result},
        ]
    messages.append({"role": "assistant", "content": words(draw, 10, 30)})
    return {"id": f"c{number}", "task_id": number % 997, "reward": float(draw.random() < 0.5), "messages": messages}


def browser_use(draw: Draw, pages: Pages, number: int) -> JSON:
    length, login = _steps(draw)
    history = []
    for i in range(length):
        name, args = action(pages, i, login)
        index = int(args["bid"])
        params: JSON = {"index": index} | ({"text": args["value"]} if "value" in args else {})
        call = {"input_text" if name == "fill" else "click_element": params}
        brain = {key: words(draw, 8, 30) for key in ("evaluation_previous_goal", "memory", "next_goal")}
        pages.refs = range(110)
        items = [
            {"index": at, "text": line.split("'")[1], "is_text_only": at % 3 > 0, "depth": line.count("\t")}
            for at, line in enumerate(draw.choices(pages.lines, k=110))
        ]
        paths = {str(item["index"]): f"//div[{draw.randint(1, 9)}]" + "/div[1]" * 9 + "/a[1]" for item in items[::3]}
        kind = {"type": "password", "aria-label": "Password"} if i == login else {"class": "btn wide"}
        element = {"tag_name": "input" if name == "fill" else "a", "xpath": "//div[1]/a[1]", "attributes": kind}
        url, began = f"https://shop.example.org/{draw.getrandbits(40):x}", 1_760_000_000.0 + number * 100 + i
        history.append({
            "model_output": {"current_state": brain, "action": [call]},
            "result": [{"is_done": i == length - 1, "extracted_content": words(draw, 10, 40), "success": True}],
            "state": {
                "url": url, "title": words(draw, 2, 5), "items": items, "selector_map": paths,
                "tabs": [{"page_id": 0, "url": url, "title": "Shop"}], "interacted_element": [element],
            },
            "metadata": {"step_start_time": began, "step_end_time": began + 1, "input_tokens": 5000, "step_number": i},
        })  # fmt: skip
    return {"history": history}


def _node(draw: Draw, tag: str, ref: int, children: list[JSON], **more: Any) -> JSON:
    left, top = round(draw.random() * 160, 6), round(draw.random() * 210, 6)
    box = {"left": left, "top": top, "width": 44.212501525878906, "height": 11.199999809265137}
    return {
        "tag": tag, **box, "children": children, "id": "", "classes": "", "ref": ref,
        "bgColor": "rgba(0, 0, 0, 0)", "fgColor": "rgb(0, 0, 0)",
    } | more  # fmt: skip


def miniwob_demos(draw: Draw, pages: Pages, number: int) -> JSON:
    labels = [_node(draw, "t", -i, [], text=words(draw, 1, 2)) for i in range(1, 13)]
    boxes = [_node(draw, "INPUT_checkbox", 2 * i + 10, [], value=False, id=f"ch{i}") for i in range(12)]
    rows = [
        _node(draw, "LABEL", 2 * i + 11, [box, text]) for i, (box, text) in enumerate(zip(boxes, labels, strict=True))
    ]
    button = _node(draw, "BUTTON", 6, [], text="Submit", classes="secondary-action")
    area = _node(draw, "DIV", 5, [*rows, button], id="area")
    query = _node(draw, "DIV", 4, [], id="query", text=f"Select {words(draw, 3, 9)} and click Submit.")
    dom = _node(draw, "BODY", 1, [_node(draw, "DIV", 2, [query, area], id="wrap")])
    at, states = 0, [{"time": 0, "action": None, "dom": dom}]
    chosen = draw.sample(boxes, draw.randint(2, 9))
    for box in [*chosen, button]:
        for kind in ("mousedown", "mouseup", "click"):
            for timing in (1, 3):
                at += draw.randint(5, 400)
                place = {"x": round(box["left"]), "y": round(box["top"])}
                states.append({"time": at, "action": {"type": kind, "timing": timing, **place}, "dom": dom})
                box["recordingTarget"] = True
                states[-1]["dom"] = orjson.loads(orjson.dumps(dom))
                del box["recordingTarget"]
        box["value"] = True
    return {
        "taskName": "click-checkboxes", "utterance": query["text"], "states": states, "reward": 0.8, "rawReward": 1,
        "fields": {"target": str(number)},
    }  # fmt: skip


def adp(draw: Draw, pages: Pages, number: int) -> JSON:
    length, login = _steps(draw)
    content: list[JSON] = [
        {"class_": "text_observation", "content": words(draw, 8, 40), "name": None, "source": "user"}
    ]
    for i in range(length):
        page, url = pages.page(14_000, login=i == login), f"https://shop.example.org/{draw.getrandbits(40):x}"
        name, args = action(pages, i, login)
        content += [
            {"class_": "web_observation", "html": None, "axtree": page, "url": url, "image_observation": None,
             "viewport_size": [1280, 1440]},
            {"class_": "api_action", "function": name, "kwargs": args, "description": words(draw, 40, 120)},
        ]  # fmt: skip
    content.append({"class_": "message_action", "content": f"<finish> {words(draw, 2, 9)} </finish>"})
    return {"id": f"t{number}", "content": content, "details": {"source": "made"}}


class Format(NamedTuple):
    make: Callable[[Draw, Pages, int], JSON]
    one_file: bool
    """A file of many lines, or a file for each episode."""
    name: str = "log.jsonl"


FORMATS = {
    "jsonl": Format(jsonl, True),
    "chat": Format(chat, True),
    "browser_use": Format(browser_use, False, "runs/{}/AgentHistoryList.json"),
    "miniwob_demos": Format(miniwob_demos, False, "made/click-checkboxes/{}.json"),
    "adp": Format(adp, True, "full_std.jsonl"),
}


def write(folder: Path, name: str, size: int, seed: int = 0) -> int:
    """Writes at least `size` bytes of a log; returns how many."""
    form, draw = FORMATS[name], Draw(seed)
    pages, written = Pages(draw), 0
    folder.mkdir(parents=True)
    if form.one_file:
        with (folder / form.name).open("wb") as file:
            for number in count():
                written += file.write(orjson.dumps(form.make(draw, pages, number)) + b"\n")
                if written >= size:
                    return written
    for number in count():
        path = folder / form.name.format(f"e{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        written += path.write_bytes(orjson.dumps(form.make(draw, pages, number)))
        if written >= size:
            break
    return written


# --- measures -----------------------------------------------------------------------------------------------


def parse(folder: Path, name: str) -> float:
    """Seconds to read the log and parse it."""
    began = time.perf_counter()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=1 << 20) as file:
            if FORMATS[name].one_file:
                for line in file:
                    orjson.loads(line)
            else:
                orjson.loads(file.read())
    return time.perf_counter() - began


class Run(NamedTuple):
    report: JSON
    seconds: float
    cpu: float
    peak_mb: float


def _tree(pid: int) -> Iterator[int]:
    """The process and its descendants that live."""
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def ingest(log: Path, source: str, store: Path, workers: int) -> Run:
    arguments = (f"path={log}", f"source={source}", f"store={store}", f"workers={workers}", "json=true")
    command = [sys.executable, "-m", "offline_lm.ingest", *arguments]
    with tempfile.TemporaryFile() as out:
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak = max(peak, sum(map(_resident, _tree(process.pid))))
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
        seconds = time.perf_counter() - began
        out.seek(0)
        printed = out.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{printed}")
    report = json.loads(printed.splitlines()[-1])
    if report["accepted"] != report["read"]:
        raise SystemExit(f"not every episode was accepted: {report}")
    return Run(report, seconds, usage.ru_utime + usage.ru_stime, peak / 1e6)


def rows(names: list[str], size: int, repeats: int, workers: int, scratch: Path) -> list[JSON]:
    sizes = {name: write(scratch / name, name, size, seed) for seed, name in enumerate(names)}
    peers: dict[str, list[float]] = {name: [] for name in names}
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            peers[name].append(parse(scratch / name, name))
            runs[name].append(ingest(scratch / name, name, scratch / f"store_{name}_{repeat}", workers))
    table = []
    for name in names:
        ours = statistics.median(run.report["seconds"] for run in runs[name])
        peer, report, mb = statistics.median(peers[name]), runs[name][0].report, sizes[name] / 1e6
        cpu = statistics.median(run.cpu for run in runs[name])
        table.append({
            "format": name, "mb": round(mb, 1), "episodes": report["episodes"], "steps": report["steps"],
            "peer": round(mb / peer, 1), "ours": round(mb / ours, 1), "ratio": round(ours / peer, 2),
            "episodes_s": round(report["episodes"] / ours, 1),
            "cpu_ms_episode": round(1000 * cpu / report["episodes"], 2),
            "peak_mb": round(max(run.peak_mb for run in runs[name])), "redacted": sum(report["redacted"].values()),
        })  # fmt: skip
    return table


def memory(size: int, workers: int, scratch: Path) -> JSON:
    """Peak at `size` bytes of jsonl and at ten times as much."""
    peaks = {}
    for times in (1, 10):
        log = scratch / f"memory_{times}"
        write(log, "jsonl", times * size, seed=times)
        peaks[f"{times}x"] = round(ingest(log, "jsonl", scratch / f"store_{log.name}", workers).peak_mb)
    return {"jsonl_mb": round(size / 1e6, 1), "workers": workers, "peak_mb": peaks}


def big(gb: float, workers: int, scratch: Path) -> JSON:
    log = scratch / "big"
    written = write(log, "jsonl", int(gb * 1e9))
    run = ingest(log, "jsonl", scratch / "store", workers)
    return {
        "ours": round(run.peak_mb), "peer": round(written / 1e6), "ratio": round(written / 1e6 / run.peak_mb, 1),
        "goal": 2000, "unit": "MB of memory (peer: MB of log)",
        "mb_s": round(written / 1e6 / run.report["seconds"], 1),
        "seconds": round(run.seconds, 1), "cpu_s": round(run.cpu, 1), "workers": workers, **_counts(run.report),
        "versions": versions(),
    }  # fmt: skip


def _counts(report: JSON) -> JSON:
    return {key: report[key] for key in ("read", "accepted", "duplicates", "quarantined", "steps")}


def versions() -> JSON:
    names = ("orjson", "pyarrow", "deltalake")
    load = [round(value, 1) for value in os.getloadavg()]
    return {"python": platform.python_version(), "cores": os.cpu_count(), "load": load} | {
        name: version(name) for name in names
    }


def main(argv: list[str]) -> None:
    given = {"json": "false", "size_mb": "40", "repeats": "3", "workers": "1", "formats": ",".join(FORMATS), "big": "0"}
    given |= {"workers": "2"} if any(argument.startswith("big=") for argument in argv) else {}
    for argument in argv:
        key, _, value = argument.partition("=")
        if key not in given:
            raise SystemExit(f"no `{key}`; there are {', '.join(given)}")
        given[key] = value
    names = given["formats"].split(",")
    if unknown := [name for name in names if name not in FORMATS]:
        raise SystemExit(f"no format {', '.join(unknown)}; there are {', '.join(FORMATS)}")
    workers, size = int(given["workers"]), int(float(given["size_mb"]) * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        if float(given["big"]):
            result = big(float(given["big"]), workers, Path(folder))
            table = []
        else:
            table = rows(names, size, int(given["repeats"]), workers, Path(folder))
            head = table[0]
            result = {
                "ours": head["ours"], "peer": head["peer"], "ratio": head["ratio"], "goal": None,
                "unit": f"MB/s of {head['format']}", "rows": table, "memory": memory(size, workers, Path(folder)),
                "versions": versions() | {"repeats": int(given["repeats"]), "workers": workers},
            }  # fmt: skip
    if given["json"] == "true":
        print(json.dumps(result))
        return
    if not table:
        print("\n".join(f"{key}: {value}" for key, value in result.items()))
        return
    print("MB/s of log: peer reads and parses, ours ingests; ratio: how many times longer ours takes")
    print("  ".join(f"{name:>14}" for name in table[0]))
    for row in table:
        print("  ".join(f"{value!s:>14}" for value in row.values()))
    peaks = result["memory"]["peak_mb"]
    print(
        f"\npeak memory with {size / 1e6:.0f} MB of jsonl: {peaks['1x']} MB; with ten times as much: {peaks['10x']} MB"
    )
    print(f"load {result['versions']['load']} on {os.cpu_count()} cores")
    print(f"\npython {' '.join([os.path.relpath(__file__), *argv])}")


if __name__ == "__main__":
    main(sys.argv[1:])
