"""Logs of five formats, made with random contents so that no episode is a duplicate: what `ingest.py` reads.

    jsonl          8 to 16 steps, each with a page of 14 KB as an accessibility tree
    chat           OpenAI messages: a system prompt of 6 KB, 8 to 16 tool calls with results of some KB
    browser_use    a history for each episode: items of the page, selectors, results, elements acted on
    miniwob_demos  a demonstration for each episode: 20 to 60 states of the page, four in five DOM events a click's half
    adp            8 to 16 steps, web pages of 14 KB and calls

One page in three ends in "Cookie settings · Sign in" and one episode in ten passes a login form with a typed password,
so that redaction has what it has in real logs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
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
