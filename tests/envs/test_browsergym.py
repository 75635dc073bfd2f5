"""BrowserGym's tasks without BrowserGym: what is made of its tree, and what is said where it is missing."""

import importlib.util
import os

import pytest

from offline_lm import collect
from offline_lm.envs import browsergym
from offline_lm.envs.miniwob import candidates


def node(id_, role, name="", *, ref=None, children=(), **flags):
    return {
        "nodeId": id_,
        "role": {"value": role},
        "name": {"value": name},
        "childIds": list(children),
        "properties": [{"name": key, "value": {"value": value}} for key, value in flags.items()],
    } | ({"browsergym_id": ref} if ref else {})


TREE = {
    "nodes": [
        node("1", "RootWebArea", "Task", children=["2", "5", "6", "7", "8", "9"]),
        node("2", "combobox", ref="13", children=["3"], hasPopup="menu"),
        node("3", "MenuListPopup", children=["4", "10"]),
        node("4", "option", "Ann", ref="14"),
        node("10", "option", "Bob", ref="15"),
        node("5", "button", "Submit", ref="19"),
        node("6", "textbox", ref="20"),
        node("7", "textbox", ref="21", readonly=True),
        node("8", "button", "Hidden", ref="22"),
        node("9", "generic", "Plain", ref="23"),
    ]
}
SEEN = {ref: {"visibility": 1.0, "clickable": ref != "23"} for ref in ("13", "14", "15", "19", "20", "21", "23")}
SEEN["22"] = {"visibility": 0.0, "clickable": True}


def test_actions_on_its_tree():
    """Options of a list, a click where one can, the goal's texts in fields; nothing hidden, plain or read-only."""
    found = browsergym.elements(TREE, SEEN)
    assert candidates(found, 'Enter "mug".') == (
        "select_option('13', 'Ann')",
        "select_option('13', 'Bob')",
        "click('19')",
        "click('20')",
        "fill('20', 'mug')",
        "click('21')",
    )


@pytest.mark.skipif(importlib.util.find_spec("browsergym") is not None, reason="BrowserGym is installed")
def test_a_missing_package_is_named(tmp_path, capsys):
    argv = ["env=browsergym/miniwob.click-test", f"store={tmp_path / 'a'}"]
    assert collect.main(argv) == 2
    assert "needs `pip install browsergym-miniwob`" in capsys.readouterr().err
    assert collect.main(["env=browsergym/openended", *argv[1:]]) == 2
    assert "needs `pip install browsergym-core`" in capsys.readouterr().err


def test_where_its_pages_are(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {})
    browsergym.find_pages(str(tmp_path))
    assert os.environ["MINIWOB_URL"] == f"file://{tmp_path}/miniwob/"
    browsergym.find_pages("http://other")  # what is set stays
    assert os.environ["MINIWOB_URL"] == f"file://{tmp_path}/miniwob/"
    monkeypatch.setattr(os, "environ", {})
    browsergym.find_pages("http://host/x/miniwob/")
    assert os.environ["MINIWOB_URL"] == "http://host/x/miniwob/"
