"""An action that names an element by its number is read with the element's line; nothing else of it changes."""

import pytest

from offline_lm.batches.grounding import MOST, elements, notes
from offline_lm.batches.tokens import tokenize
from offline_lm.models.backbone import train_tokenizer

AXTREE = "RootWebArea 'Desk'\n\t[9] link 'Home', clickable\n\t[12] heading 'Find'\n\tStaticText 'Floor 12 is closed.'"
ARIA = '- link "A" [ref=e3]\n- button "Go" [ref=e5] [cursor=pointer]:\n  - text: 5'
HTML = "<a id=\"3\">Back</a>\n<button id='a7'>Pay</button>\n<input id=x bid=14 value=2>"
INDEXED = "[2]<a>Two\n[12]<input>n\n14: Send (button)\nprice 14: 3"


@pytest.mark.parametrize(
    ("page", "action", "line"),
    [
        (AXTREE, "click('12')", "[12] heading 'Find'"),
        (AXTREE, "fill('9', '12')", "[9] link 'Home', clickable"),  # the first that is named
        (ARIA, "click('e5')", '- button "Go" [ref=e5] [cursor=pointer]:'),
        (ARIA, "click ref=e3", '- link "A" [ref=e3]'),
        (ARIA, "page.locator('aria-ref=e5').click()", '- button "Go" [ref=e5] [cursor=pointer]:'),
        (HTML, "click [a7]", "<button id='a7'>Pay</button>"),
        (HTML, "CLICK 3", '<a id="3">Back</a>'),
        (HTML, "type [14] [hello]", "<input id=x bid=14 value=2>"),
        (INDEXED, '{"action": "input_text", "text": "2 tickets", "index": "12"}', "[12]<input>n"),
        (INDEXED, '{"click_element": {"index": 14}}', "14: Send (button)"),
    ],
)
def test_the_line_of_the_element_that_an_action_names(page, action, line):
    assert notes([action], page) == [f" # {line}"]


@pytest.mark.parametrize("action", ["click('13')", "go_back()", "click[green mug]", "scroll(0, 200)", "wait 1.9", ""])
def test_what_names_none_stays_as_it_is(action):
    assert notes([action], AXTREE) == [""]
    assert notes([action], "") == [""]
    assert notes(["click('9')", action], AXTREE) == [" # [9] link 'Home', clickable", ""]


def test_elements_that_share_a_line_have_their_parts_of_it():
    assert elements("Pages: [1] Home [2] About us [13] Help") == {
        "1": "Pages: [1] Home", "2": "[2] About us", "13": "[13] Help",
    }  # fmt: skip
    html = "<ul><li id=3>Tea</li><li><a class=x id='4'>Coffee</a></li></ul>"
    assert elements(html) == {"3": "<ul><li id=3>Tea</li><li>", "4": "<a class=x id='4'>Coffee</a></li></ul>"}


def test_a_number_of_several_lines_names_none_and_long_lines_are_cut():
    named = elements("[4] a\n[4] b\n[5] " + "x" * 300)
    assert named.keys() == {"5"}
    assert len(named["5"]) == MOST + 1


def row(**values):
    empty = dict.fromkeys(
        ("goal", "start_url", "url", "messages", "observation", "observation_error", "action", "response", "candidates",
         "tokenizer_id", "prompt_token_ids", "response_token_ids")
    )  # fmt: skip
    return {**empty, "episode_id": "e", "goal": "Go home", **values}


def option(action, response=None, executed=False):
    return {"action": action, "response": response, "executed": executed}


def test_responses_are_read_with_it_where_that_is_asked_for():
    tokenizer = train_tokenizer([AXTREE, ARIA, "I see 12, so click('9') # Did:"] * 3, 400)
    options = [option("click('9')", executed=True), option("click('12')"), option("noop()", "Nothing. noop()")]
    rows = [
        row(observation=AXTREE, action="click('9')", response="I see 12, so click('9')", candidates=options),
        row(observation=ARIA, action="click('e5')"),
    ]
    end = tokenizer.eos_token

    def read(grounding):
        tokens = tokenize(rows, tokenizer, grounding=grounding)
        said = [tokenizer.decode(tokens.response(a)) for a in range(tokens.branch_ptr[-1])]
        return tokens, said, tokens.prompt(1).tolist()

    tokens, said, prompt = read(True)
    home = "[9] link 'Home', clickable"
    assert said == [
        f"I see 12, so click('9') # {home}{end}",  # by the command, not by what is said before it
        f"click('12') # [12] heading 'Find'{end}",
        f"Nothing. noop(){end}",
        f"click('e5') # - button \"Go\" [ref=e5] [cursor=pointer]:{end}",
    ]
    assert tokens.candidate_branch.tolist() == [0, 1, 2]

    _, plain, plain_prompt = read(False)
    assert plain == [f"I see 12, so click('9'){end}", f"click('12'){end}", f"Nothing. noop(){end}", f"click('e5'){end}"]
    assert prompt == plain_prompt
