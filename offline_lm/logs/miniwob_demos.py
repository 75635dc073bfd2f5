"""Human demonstrations of MiniWoB++ (Liu et al. 2018), recorded as DOM events: one file, one episode.

A file holds ``states``: the page and the DOM event, once before the page handled it (``timing`` 1) and once
after (3). Events become the actions that a person took:

- ``click(ref)``, ``dblclick(ref)``: mousedown, mouseup, click, and the label's synthetic click on its input.
- ``drag(from, to)``: the mouse moved more than 4 px between down and up; ``mouse_drag(x1, y1, x2, y2)`` off
  the page.
- ``mouse_click(x, y)``: a click that hit no element of the page.
- ``fill(ref, "text")``: a run of keys on one field, with the field's value after it.
- ``type(ref, "keys")``: a run that left the recorded value as it was (half of a date, say).
- ``press("Enter")``, ``press("ArrowDown", 12)``, ``press("Control+c")``: Tab, Enter, Escape, arrows,
  shortcuts, and any key on what is not a field. The same key again on the same element, or held down, is one
  action with a count.
- ``scroll(ref)``: scrolling that is not the effect of typing or of dragging a scroll bar.

The observation is the page just before. A click's page is the one before the mouse went down: by the time of
the click event a checkbox has toggled already. ``recordingTarget``, which marks the element about to be acted
on, finds the target here and is never rendered.

``rawReward`` is the reward of the last action (``reward`` is discounted by time and unused), earlier actions
get 0; ``success`` is rawReward == 1. The last state is the final observation. After the end the page numbers
its elements anew; they get their old refs back, so that a page that did not change also reads the same.

The files do not say whether the task's time limit ended an episode. A limit gives -1, so a reward of -1 where
the page was not numbered anew has ``end_reason=unknown`` and ``truncated`` null; the outcome is the
environment's own in every case, hence ``terminated=True``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from offline_lm.logs import _files
from offline_lm.logs._adapters import Sample, contents, rejected
from offline_lm.logs._records import Bad, count_keys, parse
from offline_lm.types import Episode, Rejected, Step

SOURCE = "miniwob_demos"
SUFFIXES = (".json", ".json.gz")
DRAG_PX = 4

Node = dict[str, Any]
State = dict[str, Any]


def detect(sample: Sample) -> str | None:
    return "states and a rawReward" if {"states", "rawReward", "utterance"} <= sample.keys else None


def find(path: Path) -> Iterator[Path]:
    return _files.find(path, SUFFIXES)


def read(path: Path) -> Iterator[Episode | Rejected]:
    """Every demonstration of a file or folder: one Episode or one Rejected for each file.

    Rejected for what it lacks: ``no_steps`` (nothing but an initial page, or not even that), ``missing_key``,
    ``wrong_type``, the reasons of JSON syntax, ``damaged_file``, ``too_large``.

    Raises:
        UserError: a folder without .json or .json.gz files.
    """
    return map(_read_file, find(path))


def _read_file(path: Path) -> Episode | Rejected:
    data, sha256 = b"", None
    try:
        data = contents(path)
        sha256 = hashlib.sha256(data).hexdigest()
        return _episode(parse(data, refuse_duplicates=False), path, sha256)
    except Bad as bad:
        return rejected(SOURCE, path, bad, 0, data, sha256)


def _episode(demo: Any, path: Path, sha256: str) -> Episode:
    _check(demo)
    task = demo.get("taskName") or path.parent.name
    collection = path.parent.parent.name
    stem = path.name.removesuffix(".gz").removesuffix(".json")
    states: list[State] = demo["states"]
    pages = _pages(states)
    renumbered = _restore_refs(pages)
    steps = _decode(pages)
    if not steps:
        what = f"the {len(states)} recorded states hold no action" if states else "states is empty"
        raise Bad("no_steps", f"{what}: the recorder failed or nothing was done; leave the file out")
    reward = float(demo["rawReward"])
    ended_by_action = renumbered or reward != -1
    steps[-1] |= {"terminated": True, "truncated": False if ended_by_action else None}
    for i, step in enumerate(steps):
        step |= {"reward": reward if i == len(steps) - 1 else 0.0, "reward_source": "env"}
    last = states[-1]
    times = {"time_ms": last["time"]}
    steps.append({"observation": render(last["dom"]), "is_final_observation": True, "extra": times})
    extra = {key: demo[key] for key in ("fields", "reward") if key in demo}
    return Episode(
        source=SOURCE,
        native_id=f"{collection}/{task}/{stem}",
        dataset=collection,
        steps=tuple([Step(step=i, observation_kind="dom", **step) for i, step in enumerate(steps)]),
        benchmark="miniwob",
        task_id=f"miniwob/{task}",
        task_family=task,
        site="miniwob",
        goal=demo["utterance"],
        policy_id="human",
        policy_kind="human",
        outcome_reward=reward,
        raw_reward=reward,
        success=reward == 1,
        terminated=True,
        truncated=False if ended_by_action else None,
        end_reason="env_done" if ended_by_action else "unknown",
        duration_s=(last["time"] - states[0]["time"]) / 1000,
        uri=str(path),
        sha256=sha256,
        extra=extra,
    )


# --- what a file must be ------------------------------------------------------------------------------------


_EVENTS = frozenset({"mousedown", "mouseup", "click", "dblclick", "keydown", "keypress", "keyup", "scroll"})


def _check(demo: Any) -> None:
    """Raise Bad unless every part that is read below is there and has its type; pages are left to
    `_pages`."""
    if type(demo) is not dict:
        raise Bad("not_an_object", "not a JSON object; a demonstration has utterance, states and rawReward")
    _need(demo, "", {"utterance": str, "states": list, "rawReward": (int, float)})
    if demo.get("taskName") is not None:
        _need(demo, "", {"taskName": str})
    for i, state in enumerate(demo["states"]):
        place = f"states[{i}]."
        if type(state) is not dict:
            raise Bad("wrong_type", f"states[{i}] must be an object")
        _need(state, place, {"time": (int, float), "dom": dict})
        if (action := state.get("action")) is not None:
            if type(action) is not dict:
                raise Bad("wrong_type", f"{place}action must be an object or null")
            _need(action, f"{place}action.", {"type": str, "timing": int})
            if action["type"] in ("mousedown", "mouseup", "click", "dblclick"):
                _need(action, f"{place}action.", {"x": (int, float), "y": (int, float)})
            elif action["type"] in ("keydown", "keypress", "keyup"):
                _need(action, f"{place}action.", {"keyCode": int, "charCode": int})
    if (fields := demo.get("fields")) is not None:
        _need(demo, "", {"fields": dict})
        count_keys(fields)  # bounds its depth


def _pages(states: list[State]) -> list[State]:
    """The states that are read: the page before each event, and the last page. Raises Bad if a node is
    malformed.

    A scroll cannot be caught before it happens, so its page after (``timing`` 2) is taken as well.
    """
    pages = [state for state in states if _is_before(state.get("action"))]
    if states and (not pages or pages[-1] is not states[-1]):
        pages.append(states[-1])
    for state in pages:
        for node in _walk(state["dom"]):
            if type(node) is not dict or type(node.get("tag")) is not str or type(node.get("ref")) is not int:
                raise Bad("bad_node", f"the page at time {state['time']} holds a node without tag or ref")
            if type(node.get("children", [])) is not list:
                raise Bad("bad_node", f"the page at time {state['time']} holds children that are no list")
    return pages


def _is_before(action: dict[str, Any] | None) -> bool:
    if not action or action["type"] not in _EVENTS:
        return False
    return action["timing"] == 1 or (action["type"] == "scroll" and action["timing"] == 2)


def _need(record: dict[str, Any], place: str, types: dict[str, type | tuple[type, ...]]) -> None:
    for key, kind in types.items():
        value = record.get(key)
        if value is None:
            raise Bad("missing_key", f"{place}{key} is missing")
        if not isinstance(value, kind) or type(value) is bool:
            raise Bad("wrong_type", f"{place}{key} is {str(value)[:40]!r}, of the wrong type")


def _walk(dom: Node) -> Iterator[Node]:
    """Nodes in document order."""
    stack = [dom]
    while stack:
        node = stack.pop()
        yield node
        if type(node) is dict and type(children := node.get("children")) is list:
            stack += reversed(children)


def _restore_refs(states: list[State]) -> bool:
    """Give pages that were numbered anew at the end the refs of the page before; True if there were any.

    Elements are matched by their place in the document, so only a page of the same shape is restored.
    """
    renumbered = False
    for before, after in pairwise(states):
        if before["dom"]["ref"] == after["dom"]["ref"]:
            continue
        renumbered = True
        old, new = list(_walk(before["dom"])), list(_walk(after["dom"]))
        if [node["tag"] for node in old] == [node["tag"] for node in new]:
            for was, now in zip(old, new, strict=True):
                now["ref"] = was["ref"]
    return renumbered


# --- the page as text ---------------------------------------------------------------------------------------


def render(dom: Node) -> str:
    """One line for each element, indented by depth: ``[ref] tag #id .class "text" value="..." checked
    focused``.

    Text between elements is a quoted line of its own. Where nothing else tells an element from its like
    (shapes of a drawing, a leaf without text, value, id or class), its box follows: ``@left,top
    widthxheight`` in px.
    """
    lines: list[str] = []
    stack = [(dom, 0)]
    while stack:
        node, depth = stack.pop()
        lines.append("  " * depth + _line(node))
        stack += [(child, depth + 1) for child in reversed(node.get("children", ()))]
    return "\n".join(lines)


def _line(node: Node) -> str:
    tag, text, value = node["tag"], node.get("text"), node.get("value")
    if tag == "t":
        return _quote(text)
    ident, classes = node.get("id"), node.get("classes")  # classes of SVG elements were recorded as {}
    parts = [f"[{node['ref']}]", tag.lower()]
    if type(ident) is str and ident:
        parts.append(f"#{ident}")
    if type(classes) is str and classes:
        parts += [f".{name}" for name in classes.split()]
    if type(text) is str and text:
        parts.append(_quote(text))
    if value is True:
        parts.append("checked")
    elif type(value) is str and value:
        parts.append(f"value={_quote(value)}")
    drawn = tag.islower() and not ident
    if (drawn or len(parts) == 2) and not node.get("children") and type(value) is not bool:
        left, top, width, height = (round(node.get(side, 0)) for side in ("left", "top", "width", "height"))
        parts.append(f"@{left},{top} {width}x{height}")
    if node.get("tampered"):
        parts.append("tampered")
    if node.get("focused") and tag != "BODY":
        parts.append("focused")
    return " ".join(parts)


def _quote(text: Any) -> str:
    return orjson.dumps(text if type(text) is str else "").decode()


# --- events to actions --------------------------------------------------------------------------------------

_FIELDS = frozenset(
    f"INPUT_{kind}"
    for kind in (
        "text",
        "password",
        "date",
        "time",
        "number",
        "email",
        "search",
        "tel",
        "url",
        "month",
        "week",
    )
) | {"TEXTAREA"}
_KEYS = {8: "Backspace", 9: "Tab", 13: "Enter", 27: "Escape", 32: "Space", 33: "PageUp", 34: "PageDown"}
_KEYS |= {
    35: "End",
    36: "Home",
    37: "ArrowLeft",
    38: "ArrowUp",
    39: "ArrowRight",
    40: "ArrowDown",
    46: "Delete",
}
_KEYS |= {96 + i: str(i) for i in range(10)}  # the numeric keypad
_PRESSED = frozenset({9, 13, 27, 37, 38, 39, 40})
"""Keys that are an action of their own, also in a field."""
_CONTROL = frozenset({17, 91, 93, 224})
"""Control, and Command on a Mac."""
_MODIFIERS = _CONTROL | {16, 18, 20, 92, 144, 225}
_KEY_EFFECT = frozenset({13, 32})
"""Enter and Space click the focused element: the click event after them is their effect."""


def _decode(pages: list[State]) -> list[dict[str, Any]]:
    """The fields of each decision, by the rules of the module; `pages` as `_pages` gives them."""
    steps: list[dict[str, Any]] = []
    held: set[int] = set()
    events: list[int] = []
    shortcuts: set[int] = set()
    for i, state in enumerate(pages):
        action = state.get("action")
        if action is None or not _is_before(action):
            continue
        if action["type"] == "keyup":
            held.discard(action["keyCode"])
            continue
        if action["type"] == "keydown":
            if action["keyCode"] in _CONTROL:
                held.add(action["keyCode"])
            elif held:
                shortcuts.add(i)
        events.append(i)
    events = _keys_after_the_click(pages, events)
    at = 0
    while at < len(events):
        kind = pages[events[at]]["action"]["type"]
        if kind == "mousedown":
            step, at = _gesture(pages, events, at)
        elif kind == "keydown":
            step, at = _keys(pages, events, at, shortcuts)
        elif kind == "scroll":
            step, at = _scroll(pages, events, at)
        else:
            step = _stray(pages[events[at]], steps)
            at += 1
        if step is None:
            continue
        if step["action_name"] == "press" and steps and _same_press(steps[-1], step):
            args = steps[-1]["action_args"]
            args["count"] += 1
            steps[-1]["action"] = f"press({_quote(args['key'])}, {args['count']})"
            steps[-1]["extra"]["end_ms"] = step["extra"]["end_ms"]
        else:
            steps.append(step)
    return steps


def _keys_after_the_click(pages: list[State], events: list[int]) -> list[int]:
    """Events with the keys that came while the mouse button was down (often a held key) put after the click.

    Left where they are they would cut one click into a lone mousedown and two stray clicks.
    """
    ordered: list[int] = []
    waiting: list[int] = []
    held = False
    for i in events:
        kind = pages[i]["action"]["type"]
        if kind in ("keydown", "keypress") and held:
            waiting.append(i)
            continue
        if kind == "mouseup":
            held = False
        elif kind in ("mousedown", "keydown", "keypress"):
            ordered += waiting
            waiting = []
            held = kind == "mousedown"
        ordered.append(i)
    return ordered + waiting


def _same_press(one: dict[str, Any], two: dict[str, Any]) -> bool:
    if one["action_name"] != "press" or one["action_args"]["key"] != two["action_args"]["key"]:
        return False
    return (one["target"] or {}).get("ref") == (two["target"] or {}).get("ref")


def _target(state: State) -> Node | None:
    return next((node for node in _walk(state["dom"]) if node.get("recordingTarget")), None)


def _step(
    state: State, end: State, name: str, args: dict[str, Any], shown: list[Any], node: Node | None
) -> dict[str, Any]:
    """Fields of a Step. `args` keeps all that is known of the action, `shown` is what its string says."""
    target = None
    if node is not None:
        target = {"ref": node["ref"], "tag": node["tag"].lower(), "text": _label(node)}
    return {
        "observation": render(state["dom"]),
        "action": f"{name}({', '.join(_quote(a) if type(a) is str else str(a) for a in shown)})",
        "action_name": name,
        "action_args": args,
        "action_grammar": SOURCE,
        "target": target,
        "extra": {"time_ms": state["time"], "end_ms": end["time"]},
    }


def _label(node: Node) -> str:
    """The element's own text, else that of what it holds."""
    own = node.get("text")
    if type(own) is str and own:
        return own
    return " ".join(n["text"] for n in _walk(node) if type(n.get("text")) is str and n["text"])


def _gesture(pages: list[State], events: list[int], at: int) -> tuple[dict[str, Any], int]:
    """mousedown (+ mouseup) (+ click): one click or drag. A second click without a mousedown is the
    label's."""
    down = end = pages[events[at]]
    up = click = None
    at += 1
    while at < len(events):
        state = pages[events[at]]
        kind = state["action"]["type"]
        if kind == "mouseup" and up is None:
            up = state
        elif kind == "click":
            click = click or state
        elif not (kind == "scroll" and up is None):  # scrolling with the button held: a scroll bar, or selecting
            break
        end = state
        at += 1
    start = _target(down)
    node = _target(click) if click else None
    if node is None or all(node["ref"] != seen["ref"] for seen in _walk(down["dom"])):
        node = start  # what was clicked was not yet on the page, or not recorded
    x, y = down["action"]["x"], down["action"]["y"]
    if up is not None:
        x2, y2 = up["action"]["x"], up["action"]["y"]
        if max(abs(x2 - x), abs(y2 - y)) > DRAG_PX:
            args = {"x1": x, "y1": y, "x2": x2, "y2": y2}
            to = _target(up)
            if start is None or to is None:
                return _step(down, end, "mouse_drag", args, [x, y, x2, y2], start), at
            args |= {"from_ref": start["ref"], "to_ref": to["ref"]}
            return _step(down, end, "drag", args, [start["ref"], to["ref"]], start), at
    return _click(down, end, "click", x, y, node), at


def _click(state: State, end: State, name: str, x: float, y: float, node: Node | None) -> dict[str, Any]:
    if node is None:
        return _step(state, end, "mouse_click", {"x": x, "y": y}, [x, y], None)
    return _step(state, end, name, {"ref": node["ref"], "x": x, "y": y}, [node["ref"]], node)


def _stray(state: State, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A click, dblclick, mouseup or keypress that no mousedown or keydown led to; a dblclick takes back its
    clicks."""
    action = state["action"]
    if action["type"] == "dblclick":
        clicks: list[dict[str, Any]] = []
        while steps and len(clicks) < 2 and steps[-1]["action_name"] in ("click", "mouse_click"):
            clicks.insert(0, steps.pop())
        if not clicks:
            return _click(state, state, "dblclick", action["x"], action["y"], _target(state))
        step = clicks[0]  # its page and its element; off the page it stays one mouse_click
        if step["action_name"] == "click":
            step |= {"action_name": "dblclick", "action": f"dbl{step['action']}"}
        step["extra"]["end_ms"] = state["time"]
        return step
    if action["type"] == "click":
        return _click(state, state, "click", action["x"], action["y"], _target(state))
    return None  # the button went down, or the key, before the recording began


def _keys(pages: list[State], events: list[int], at: int, shortcuts: set[int]) -> tuple[dict[str, Any] | None, int]:
    """One key that acts by itself, or a run of keys on one element. Modifiers alone are no action."""
    first = end = pages[events[at]]
    node = _target(first)
    ref = node["ref"] if node else None
    in_field = node is not None and node["tag"] in _FIELDS
    code = first["action"]["keyCode"]
    if node is None or not in_field or code in _PRESSED:
        shortcut = events[at] in shortcuts
        at += 1
        while at < len(events) and _follows(pages[events[at]]["action"], code):
            end = pages[events[at]]
            at += 1
        if code in _MODIFIERS:
            return None, at
        return _press(first, end, code, node, shortcut), at

    typed: list[str] = []
    last: tuple[int, bool] | None = None
    while at < len(events):
        state = pages[events[at]]
        action = state["action"]
        if action["type"] == "keydown":
            here = _target(state)
            if action["keyCode"] in _PRESSED or here is None or here["ref"] != ref:
                break
            if action["keyCode"] not in _MODIFIERS:
                last = action["keyCode"], events[at] in shortcuts
            if action["keyCode"] == 8 and typed:
                typed.pop()
        elif action["type"] == "keypress":
            if action["charCode"] >= 32:
                typed.append(chr(action["charCode"]))
        elif action["type"] != "scroll":
            break
        end = state
        at += 1
    until = events[at] if at < len(events) else len(pages) - 1
    before, after = node.get("value"), _value_after(pages, events[at - 1], until, ref)
    if type(after) is str and after != before:
        args = {"ref": ref, "text": after, "typed": "".join(typed)}
        return _step(first, end, "fill", args, [ref, after], node), at
    if typed:
        args = {"ref": ref, "text": "".join(typed)}
        return _step(first, end, "type", args, [ref, "".join(typed)], node), at
    return (_press(first, end, last[0], node, last[1]) if last else None), at


def _follows(action: dict[str, Any], code: int) -> bool:
    """Whether an event is the effect of the key that went down: its character, or the click of Enter and
    Space."""
    return action["type"] == "keypress" or (action["type"] == "click" and code in _KEY_EFFECT)


def _press(state: State, end: State, code: int, node: Node | None, shortcut: bool) -> dict[str, Any]:
    key = _KEYS.get(code) or (chr(code).lower() if 48 <= code <= 90 else f"Key{code}")
    if shortcut:
        key = f"Control+{key}"
    return _step(state, end, "press", {"key": key, "count": 1}, [key], node)


def _value_after(pages: list[State], first: int, until: int, ref: int | None) -> Any:
    """The value of element `ref` in the last page up to `until` that has it."""
    for i in range(until, first - 1, -1):
        for node in _walk(pages[i]["dom"]):
            if node["ref"] == ref:
                return node.get("value")
    return None


def _scroll(pages: list[State], events: list[int], at: int) -> tuple[dict[str, Any] | None, int]:
    first = end = pages[events[at]]
    while at < len(events) and pages[events[at]]["action"]["type"] == "scroll":
        end = pages[events[at]]
        at += 1
    node = _target(first)
    shown = [node["ref"]] if node else []
    return _step(first, end, "scroll", {"ref": node["ref"] if node else None}, shown, node), at
