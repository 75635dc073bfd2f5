"""Actions are parsed, never run."""

import pytest

from offline_lm.envs.action_grammar import BadAction, call, parse


@pytest.mark.parametrize(
    ("text", "name", "args"),
    [
        ("click('e3')", "click", {"bid": "e3"}),
        (' fill("e2", "it\'s \\"x\\"")\n', "fill", {"bid": "e2", "value": 'it\'s "x"'}),
        ("fill('e2', value='a, b)')", "fill", {"bid": "e2", "value": "a, b)"}),
        ("mouse_click(3, -4.5)", "mouse_click", {"x": 3.0, "y": -4.5}),
        ("press('e1', 'Control+a')", "press", {"bid": "e1", "key_comb": "Control+a"}),
        ("noop()", "noop", {}),
    ],
)
def test_reads_a_call(text, name, args):
    action = parse(text)
    assert (action.name, action.args) == (name, args)
    assert parse(str(action)) == action


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("__import__('os').system('id')", "no action"),
        ("click(open('x'))", "texts and numbers"),
        ("click('e1'); click('e2')", "no action"),
        ("click('e1') or 1", "no action"),
        ("goto('file:///etc/passwd')", "goto: there are noop"),
        ("click()", "click takes bid"),
        ("click('e1', 'left')", "click takes bid"),
        ("click(bid='e1', **{})", "given twice, or has no name"),
        ("click(3)", "bid is a text"),
        ("scroll('0', 1)", "delta_x is a number"),
        ("scroll(True, 1)", "texts and numbers"),
        ("press('e1', 'Control+a; rm')", "is no key"),
        ("click(f'{1}')", "texts and numbers"),
        ("click('e1'", "no action"),
        ("(" * 5000, "no action"),
        ("click('" + "e" * 9000 + "')", "at most 8192"),
    ],
)
def test_refuses_everything_else(text, said):
    with pytest.raises(BadAction, match=said):
        parse(text)


def test_writes_what_it_reads():
    assert call("fill", "e2", "it's") == "fill('e2', \"it's\")"
    assert call("scroll", 0, -120.0) == "scroll(0, -120)"
    assert call("noop") == "noop()"
