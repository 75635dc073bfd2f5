"""How a person would do some tasks of MiniWoB: small rules that read the goal and the page, as any agent does.

They are the skilled part of behaviour policies, not the best there is: some tasks are beyond their rules, and what they
get wrong is in the logs. Each gives the text of one of the page's actions; where none fits, any action is as good.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from offline_lm.envs.action_grammar import call, parse
from offline_lm.envs.policies import Array, State

_LINE = re.compile(r'( *)- ([\w-]+)(?: ("(?:[^"\\]|\\.)*"))?((?: \[[^\]]*\])*)(?:: (.*))?')
_ORDINALS = {"1st": 0, "2nd": 1, "3rd": 2} | {f"{n}th": n - 1 for n in range(4, 21)}


@dataclass(frozen=True, slots=True)
class Element:
    """A line of a page."""

    depth: int
    role: str
    name: str
    marks: frozenset[str]
    ref: str
    value: str


class Scene:
    """A state, read: `elements` are the page's lines, `quoted` the goal's texts in quotation marks."""

    def __init__(self, state: State) -> None:
        self.goal, self.actions, self.history = state.goal, state.actions, state.history
        self.elements = list(_read(state.observation))
        self.quoted = re.findall(r'"([^"]*)"', state.goal)

    def find(self, *roles: str, name: str | None = None, at: int = 0) -> Element | None:
        """The `at`-th element that can be acted on with one of the roles (all, if none is given) and the name."""
        return next(iter(self.all(*roles, name=name)[at:]), None)

    def all(self, *roles: str, name: str | None = None) -> list[Element]:
        fits = [e for e in self.elements if e.ref and (not roles or e.role in roles)]
        if name is None:
            return fits
        return [e for e in fits if e.name == name] or [e for e in fits if _plain(e.name) == _plain(name)]

    def count(self, action: str) -> int:
        """How often it was done."""
        return self.history.count(action)


Rule = Callable[[Scene], str | None]


def _read(observation: str) -> Iterator[Element]:
    for line in observation.split("\n"):
        if found := _LINE.fullmatch(line):
            indent, role, name, marks, value = found.groups()
            inside = re.findall(r"\[([^\]]*)\]", marks)
            ref = next((mark[4:] for mark in inside if mark.startswith("ref=")), "")
            text = "" if name is None else re.sub(r"\\(.)", r"\1", name[1:-1])
            yield Element(len(indent) // 2, role, text, frozenset(inside), ref, value or "")


def _plain(text: str) -> str:
    return text.strip().strip(".").lower()


def _click(element: Element | None) -> str | None:
    return None if element is None else call("click", element.ref)


def _submit(scene: Scene) -> str | None:
    named = (scene.find("button", name=name) for name in ("Submit", "Login", "OK", "Search"))
    return _click(next(filter(None, named), None) or scene.find("button"))


def _fill(scene: Scene, wanted: Iterable[tuple[int, str]]) -> str | None:
    """Fills the fields by their number, then submits."""
    fields = scene.all("textbox", "searchbox", "spinbutton")
    for number, text in wanted:
        if number >= len(fields):
            return None
        if fields[number].value != text:
            return call("fill", fields[number].ref, text)
    return _submit(scene)


def _listed(goal: str) -> list[str]:
    """The items of "Select a, b and click Submit"."""
    found = re.search(r"Select (.*?)(?: from the \w+)? and click Submit", goal, re.IGNORECASE)
    return [] if found is None or found[1] == "nothing" else found[1].split(", ")


# -- rules -------------------------------------------------------------------------------------------------------


def _named(scene: Scene) -> str | None:
    """Click what the goal quotes."""
    return _click(scene.find(name=scene.quoted[0])) if scene.quoted else _click(scene.find("button"))


def _button_one(scene: Scene) -> str | None:
    found = re.search(r"button (\w+)", scene.goal, re.IGNORECASE)
    return _click((scene.find("button", name=found[1]) if found else None) or scene.find("button"))


def _dialog(scene: Scene) -> str | None:
    label = scene.quoted[0] if scene.quoted else "x"
    return _click(scene.find("button", name="Close" if label == "x" else label))


def _sequence(scene: Scene) -> str | None:
    for word in re.findall(r"button (\w+)", scene.goal, re.IGNORECASE):
        action = _click(scene.find("button", name=word))
        if action is not None and not scene.count(action):
            return action
    return None


def _boxes(scene: Scene) -> str | None:
    wanted = {_plain(item) for item in _listed(scene.goal)}
    for box in scene.all("checkbox"):
        if (_plain(box.name) in wanted) != ("checked" in box.marks):
            return _click(box)
    return _submit(scene)


def _radio(scene: Scene) -> str | None:
    for item in _listed(scene.goal):
        button = scene.find("radio", name=item)
        if button is not None and "checked" not in button.marks:
            return _click(button)
    return _submit(scene)


def _choose(scene: Scene) -> str | None:
    field, items = scene.find("combobox"), _listed(scene.goal)
    if field is None or not items:
        return None
    action = call("select_option", field.ref, items[0])
    return _submit(scene) if scene.count(action) else action


def _enter(scene: Scene) -> str | None:
    return _fill(scene, [(0, scene.quoted[0])]) if scene.quoted else None


def _password(scene: Scene) -> str | None:
    return _fill(scene, [(0, scene.quoted[0]), (1, scene.quoted[0])]) if scene.quoted else None


def _login(scene: Scene) -> str | None:
    popup = [e for e in scene.all("button") if _plain(e.name) in ("cancel", "close", "not now", "no thanks")]
    if popup:
        return _click(popup[0])
    return _fill(scene, enumerate(scene.quoted[:2]))


def _focus(scene: Scene) -> str | None:
    found = re.search(r"(\d+\w\w) input", scene.goal)
    return _click(scene.find("textbox", at=_ORDINALS[found[1]] if found else 0))


def _widget(scene: Scene) -> str | None:
    kind = scene.quoted[0] if scene.quoted else ""
    if kind in ("text", "textarea"):
        return _click(next((e for e in scene.all("textbox") if ("multiline" in e.marks) == (kind == "textarea")), None))
    return _click(scene.find(kind))


def _tab(scene: Scene) -> str | None:
    found = re.search(r"Tab #\d+", scene.goal)
    return _click(scene.find("tab", name=found[0])) if found else None


def _hidden_link(scene: Scene) -> str | None:
    """The link if it is seen; else the next tab or section that was not opened yet."""
    link = next((e for e in scene.all(name=scene.quoted[0]) if e.role != "tab"), None) if scene.quoted else None
    if link is not None:
        return _click(link)
    unseen = [e for e in scene.all("tab") if "expanded" not in e.marks and e.name]
    return next((call("click", e.ref) for e in unseen if not scene.count(call("click", e.ref))), None)


def _collapsible(scene: Scene) -> str | None:
    section = scene.find("tab")
    if section is not None and "expanded" not in section.marks:
        return _click(section)
    return _submit(scene)


def _tree(scene: Scene) -> str | None:
    found = scene.all(name=scene.quoted[0]) if scene.quoted else []
    if found:
        return _click(found[-1])
    done = {parse(action).args.get("bid") for action in scene.history}
    return _click(next((e for e in scene.all("generic") if "expandable" in e.name and e.ref not in done), None))


def _menu(scene: Scene) -> str | None:
    path = scene.goal.removeprefix("Select ").split(">")
    shown = [found for name in path if (found := scene.find("menuitem", name=name))]
    if not shown:
        return None
    return call("click" if len(shown) == len(path) else "hover", shown[-1].ref)


def _stamp(scene: Scene) -> str | None:
    """The one text that fits the field."""
    action = next((action for action in scene.actions if action.startswith("fill")), None)
    return _submit(scene) if action is None or scene.count(action) else action


def _search(scene: Scene) -> str | None:
    field = scene.find("textbox", "searchbox")
    place = next((_ORDINALS[word] for word in scene.goal.split() if word in _ORDINALS), None)
    if field is None or not scene.quoted or place is None:
        return None
    typed, asked = call("fill", field.ref, scene.quoted[0]), _submit(scene)
    if not scene.count(typed):
        return typed
    if asked is None or not scene.count(asked):
        return asked
    results = [e for e in scene.all("link", "generic") if not re.fullmatch(r"[<>\d]+", e.name) and e.name]
    page, at = divmod(place, 3)
    onward = scene.find(name=">")
    if onward is not None and scene.count(call("click", onward.ref)) < page:
        return _click(onward)
    return _click(results[at]) if at < len(results) else None


def _autocomplete(scene: Scene) -> str | None:
    field = scene.find("textbox")
    if field is None or not scene.quoted:
        return None
    start, end = scene.quoted[0], scene.quoted[-1] if len(scene.quoted) > 1 else ""
    if field.value.startswith(start) and field.value.endswith(end) and scene.history[-1:] != (_typed(field, start),):
        return _submit(scene)
    items = [e for e in scene.all() if e.role in ("option", "generic", "menuitem", "listitem")]
    fits = [e for e in items if e.name.startswith(start) and e.name.endswith(end)]
    return _click(fits[0]) if fits else _typed(field, start)


def _typed(field: Element, text: str) -> str:
    return call("fill", field.ref, text)


def _ascending(scene: Scene) -> str | None:
    done = {parse(action).args.get("bid") for action in scene.history}
    numbers = [e for e in scene.all() if re.fullmatch(r"\d+", e.name) and e.ref not in done]
    return _click(min(numbers, key=lambda e: int(e.name), default=None))


def _mail(scene: Scene) -> str | None:
    """Star or delete the mail of someone: the icons come after the name."""
    found = re.search(r"(?:by|from) (\w+)", scene.goal)
    kind = "star" if "star" in scene.goal or "important" in scene.goal else "trash"
    if found is None:
        return None
    lines = iter(scene.elements)
    for e in lines:
        if e.value == found[1]:
            return _click(next((x for x in lines if x.ref and x.name.startswith(kind)), None))
    return None


def _social(scene: Scene) -> str | None:
    user = re.search(r"@\w+", scene.goal)
    if user is None or not scene.quoted:
        return None
    wanted, lines = _plain(scene.quoted[0]), iter(scene.elements)
    for e in lines:
        if user[0] in e.value.split() or user[0] in e.name.split():
            near = list(lines)
            shown = next((x for x in near if x.ref and _plain(x.name).split(" ")[0] == wanted), None)
            more = next((x for x in near if x.ref and x.name.startswith("more")), None)
            return _click(shown or more)
    return None


RULES: dict[str, Rule] = {
    "ascending-numbers": _ascending,
    "choose-list": _choose,
    "click-button": _named,
    "click-button-sequence": _sequence,
    "click-checkboxes": _boxes,
    "click-checkboxes-large": _boxes,
    "click-checkboxes-transfer": _boxes,
    "click-collapsible": _collapsible,
    "click-collapsible-2": _hidden_link,
    "click-dialog": _dialog,
    "click-dialog-2": _dialog,
    "click-link": _named,
    "click-menu": _menu,
    "click-option": _radio,
    "click-tab": _tab,
    "click-tab-2": _hidden_link,
    "click-tab-2-easy": _hidden_link,
    "click-tab-2-medium": _hidden_link,
    "click-test": _button_one,
    "click-test-2": _button_one,
    "click-test-transfer": _button_one,
    "click-widget": _widget,
    "email-inbox-delete": _mail,
    "email-inbox-important": _mail,
    "enter-date": _stamp,
    "enter-password": _password,
    "enter-text": _enter,
    "enter-text-dynamic": _enter,
    "enter-time": _stamp,
    "focus-text": _focus,
    "focus-text-2": _focus,
    "login-user": _login,
    "login-user-popup": _login,
    "navigate-tree": _tree,
    "search-engine": _search,
    "social-media": _social,
    "use-autocomplete": _autocomplete,
}
"""By task. Those of a task's variants are its own."""


def probabilities(states: Sequence[State]) -> list[tuple[Array, Sequence[float] | None]]:
    """All on the action that the task's rule gives; every action alike where it gives none of them."""
    given: list[tuple[Array, Sequence[float] | None]] = []
    for state in states:
        rule = RULES.get(state.task)
        action = None if rule is None else rule(Scene(state))
        if action in state.actions:
            given.append((np.eye(len(state.actions))[state.actions.index(action)], None))
        else:
            given.append((np.full(len(state.actions), 1 / len(state.actions)), None))
    return given
