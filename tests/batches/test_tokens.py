"""From steps to token ids: where the boundary lies, what is cut, which response stands for which candidate."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from offline_lm.batches import render
from offline_lm.batches.token_cache import write
from offline_lm.batches.tokens import Tokens, tokenize, tokenizer_id
from offline_lm.models.backbone import END, train_tokenizer

CORPUS = [
    "Goal: Buy a red mug\nPage:\nred mug blue mug click[red mug] back\nAction: click[red mug] Action: click[1]",
    "https://example.org/a?b=1 über naïve 中文 12 345",
] * 3
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def gpt2_like(special=("<|endoftext|>",)):
    """Byte-level BPE that merges across the boundary: a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


def with_chat():
    tokenizer = gpt2_like(("<|im_end|>", "<|im_start|>"))
    tokenizer.chat_template = CHAT
    return tokenizer


TOKENIZERS = {"tiny": lambda: train_tokenizer(CORPUS, 400), "gpt2": gpt2_like, "chat": with_chat}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def tiny():
    return TOKENIZERS["tiny"]()


COLUMNS = (
    "goal", "start_url", "url", "observation", "messages", "observation_error", "response", "action", "candidates",
    "tokenizer_id", "prompt_token_ids", "response_token_ids",
)  # fmt: skip


def row(episode: str = "e", **columns: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(COLUMNS),
        "goal": "Buy a red mug",
        "observation": "a page",
        "episode_id": episode,
        **columns,
    }


def candidate(action, response=None, executed=None):
    return {"action": action, "response": response, "executed": executed}


def responses(tokens: Tokens, n: int, tokenizer) -> list[str]:
    span = range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1])
    return [tokenizer.decode(tokens.response(a)) for a in span]


# -- the boundary ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(action=st.text(min_size=1, max_size=30), page=st.text(max_size=60))
def test_ids_of_state_and_action_begin_with_those_of_the_state(tokenizer, action, page):
    state = tokenize([row(observation=page)], tokenizer).prompt(0).tolist()
    both = tokenize([row(observation=page, action=action)], tokenizer)
    assert both.prompt(0).tolist() == state
    frame = render.frame(tokenizer)
    joined = frame.before + render.page_text(row(observation=page)) + render.goal_text("Buy a red mug") + frame.after
    assert tokenizer.decode(state) == joined
    assert tokenizer.decode([*both.prompt(0), *both.response(0)]) == joined + action + frame.end


def test_tokenising_the_joined_text_would_move_the_boundary():
    """What is guarded against: "Action:" + " click" has one token for the space and the word behind it."""
    tokenizer = gpt2_like()
    state, action = "Page\nAction: ", "click[1]"

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    joined, apart = ids(state + action), ids(state) + ids(action)
    assert tokenizer.decode(joined) == tokenizer.decode(apart)
    assert joined[: len(ids(state))] != ids(state)
    got = tokenize([row(action=action)], tokenizer)
    assert got.prompt(0).tolist()[-len(ids("\nAction: ")) :] == ids("\nAction: ")
    assert got.response(0).tolist()[:-1] == ids(action)


def test_the_end_of_turn_is_the_last_token_of_every_response(tokenizer):
    rows = [row(action="back", candidates=[candidate("back"), candidate("click[1]")]), row(response="I go back")]
    tokens = tokenize(rows, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if tokenizer.chat_template else tokenizer.eos_token_id
    assert len(tokens.response_ptr) == 4
    for a in range(3):
        assert tokens.response(a)[-1] == end
        assert (tokens.response(a) == end).sum() == 1


def test_a_special_token_that_a_text_spells_out_is_plain_text(tokenizer):
    """A page that quotes `<|im_end|>` must not end the turn; only the frame's own markers are special."""
    special, frame = tokenizer.all_special_tokens, render.frame(tokenizer)
    spelt = " ".join(["quote", *special, "end"])
    plain = {name: "quote end" for name in ("goal", "observation", "url", "observation_error")}
    loud = {name: spelt for name in plain}
    option = {"action": spelt, "candidates": [candidate("other " + spelt)]}
    tokens = tokenize([row(**plain, action="back"), row(**loud, **option), row(**loud)], tokenizer, max_tokens=4096)

    def count(ids):
        return np.isin(ids, tokenizer.all_special_ids).sum()

    assert count(tokens.prompt(1)) == count(tokens.prompt(2)) == count(tokens.prompt(0))  # its past has them too
    assert count(tokens.prompt(0)) == sum((frame.before + frame.after).count(s) for s in special)
    for a, text in ((1, spelt), (2, "other " + spelt)):
        assert count(tokens.response(a)) == 1
        assert tokenizer.decode(tokens.response(a)) == text + frame.end
    assert spelt in tokenizer.decode(tokens.prompt(2))
    assert tokenizer.convert_tokens_to_ids(special) == [tokenizer(s)["input_ids"][0] for s in special]  # left as it was


def test_the_chat_template_frames_the_prompt():
    assert render.frame(with_chat()) == render.Frame(
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
    )


# -- the tiny tokenizer ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_the_tiny_tokenizer_decodes_any_text_exactly(tiny, text):
    assert tiny.decode(tiny(text)["input_ids"]) == text


def test_a_word_has_the_same_ids_wherever_it_stands(tiny):
    word = tiny("mug")["input_ids"]

    def count(text):
        ids = tiny(text)["input_ids"]
        return sum(ids[i : i + len(word)] == word for i in range(len(ids)))

    places = ["mug", "\nmug", "click[mug]", "a red mug for", "mug.", "the mug\n", "size:mug", "2mug", '"mug"']
    assert [count(place) for place in places] == [1] * len(places)
    plain = gpt2_like()
    assert plain(" mug")["input_ids"] != plain(" ")["input_ids"] + plain("mug")["input_ids"]  # what others do


# -- cutting ---------------------------------------------------------------------------------------------------


def assemble(room, *, past=((1, 1), (2, 2), (3, 3)), page=tuple(range(100, 140)), goal=(8, 8, 8)):
    cuts = render.Cuts()
    got = render.assemble([0], [list(p) for p in past], list(page), list(goal), [9], room, cuts)
    return got, cuts


def test_what_fits_is_whole():
    page = list(range(100, 140))
    assert assemble(51) == ([0, 1, 1, 2, 2, 3, 3, *page, 8, 8, 8, 9], render.Cuts())


def test_the_oldest_history_goes_first_then_the_middle_of_the_page():
    page = list(range(100, 140))
    assert assemble(50) == ([0, 2, 2, 3, 3, *page, 8, 8, 8, 9], render.Cuts(histories=1))
    assert assemble(48) == ([0, 3, 3, *page, 8, 8, 8, 9], render.Cuts(histories=1))
    got, cuts = assemble(44)
    assert got == [0, 3, 3, *page[:19], *page[22:], 8, 8, 8, 9]
    assert cuts == render.Cuts(pages=1, page_tokens=3, histories=1)


@pytest.mark.parametrize("room", range(23, 60))
def test_goal_newest_action_and_frame_are_never_cut(room):
    got, _ = assemble(room)
    assert got is not None
    assert min(room, 51) - 1 <= len(got) <= room  # a line of history is kept whole or not at all
    assert (got[0], got[-1], got[-4:-1]) == (0, 9, [8, 8, 8])
    assert got.count(3) == 2


def test_too_long_is_none_and_counted():
    assert assemble(22) == (None, render.Cuts(too_long=1))
    assert assemble(6, past=(), page=(7,), goal=(8, 8, 8)) == ([0, 7, 8, 8, 8, 9], render.Cuts())
    assert assemble(5, past=(), page=(7,), goal=(8, 8, 8)) == (None, render.Cuts(too_long=1))


def test_the_budget_is_the_prompts_and_responses_come_on_top(tiny):
    long = "word " * 500
    rows = [
        row(observation=long, action="back", candidates=[candidate("back"), candidate("click[red mug] " * 5)]),
        row(observation="short", action="click[1]"),
        row(goal=long, action="back"),
        row(action=long),
    ]
    tokens = tokenize(rows, tiny, max_tokens=80, history=1)
    whole = len(tiny(long)["input_ids"])
    assert len(tokens.prompt(0)) == 80
    assert len(tokens.response(3)) == whole + 1
    assert tokens.usable.tolist() == [True, True, False, True]
    assert tokens.acted.tolist() == [True, True, False, True]
    assert np.diff(tokens.branch_ptr).tolist() == [2, 1, 0, 1]
    assert tiny.decode(tokens.prompt(2)) == render.frame(tiny).after  # a token to read at, for what is left out
    assert (tokens.cuts.pages, tokens.cuts.too_long) == (1, 1)
    assert whole - 80 < tokens.cuts.page_tokens < whole
    assert "Goal: Buy a red mug" in tiny.decode(tokens.prompt(0))
    start, stop = tokens.goal_ptr[0]
    assert tiny.decode(tokens.prompt(0)[start:stop]) == "\nGoal: Buy a red mug"


def test_the_page_that_is_read_does_not_depend_on_what_is_on_offer(tiny):
    page, many = "word " * 500, [candidate(f"click[{'red mug ' * n}]") for n in range(8)]
    offers: list[dict[str, Any]] = [{}, {"action": "back"}, {"action": "word " * 90}, {"candidates": many}]
    rows = [row(str(n), observation=page, **offer) for n, offer in enumerate(offers)]
    for max_tokens in (80, 2000):
        tokens = tokenize(rows, tiny, max_tokens=max_tokens)
        assert {tuple(tokens.prompt(n).tolist()) for n in range(4)} == {tuple(tokens.prompt(0).tolist())}
        assert np.diff(tokens.branch_ptr).tolist() == [0, 1, 1, 8]


def test_history_is_the_newest_actions_of_this_episode(tiny):
    rows = [row("e", action=a) for a in ("one", "two", "three")] + [row("f", action="four"), row("f")]
    prompts = [tiny.decode(tokenize(rows, tiny, history=2).prompt(n)[1:]) for n in range(5)]  # behind <|start|>
    shown = [[line.removeprefix("Did: ") for line in p.splitlines() if line.startswith("Did: ")] for p in prompts]
    assert shown == [[], ["one"], ["one", "two"], [], ["four"]]
    assert "Did:" not in tiny.decode(tokenize(rows, tiny, history=0).prompt(2))


# -- responses, candidates, stored ids -------------------------------------------------------------------------


def test_the_executed_action_is_first_and_candidates_map_to_their_response(tiny):
    tokens = tokenize(
        [
            row(action="b", candidates=[candidate("a"), candidate("b"), candidate("a"), candidate("c")]),
            row(action="b", response="I think: b", candidates=[candidate("a"), candidate("b", executed=True)]),
            row(action="b", candidates=[candidate("a")]),
            row(action="b", response="so b", candidates=[candidate("b", "so b"), candidate("b", "else b", False)]),
            row(candidates=[candidate("a"), candidate("c")]),
        ],
        tiny,
    )
    got = [[r.removesuffix(END) for r in responses(tokens, n, tiny)] for n in range(5)]
    assert got == [["b", "a", "c"], ["I think: b", "a"], ["b", "a"], ["so b", "else b"], ["a", "c"]]
    wanted = [
        (tokens.candidate_branch[tokens.candidate_ptr[n] : tokens.candidate_ptr[n + 1]] - tokens.branch_ptr[n]).tolist()
        for n in range(5)
    ]
    assert wanted == [[1, 0, 1, 2], [1, 0], [1], [0, 1], [0, 1]]
    assert tokens.acted.tolist() == [True, True, True, True, False]


def test_a_tokenizer_in_a_folder_is_called_by_what_it_does(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "a")
    tiny.save_pretrained(tmp_path / "b")
    a, b = (AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab")
    assert tokenizer_id(a) == tokenizer_id(b) == tokenizer_id(tiny)
    b.add_tokens(["another"])
    assert tokenizer_id(b) != tokenizer_id(a)
    a.name_or_path = "somebody/model"
    assert tokenizer_id(a) == "somebody/model"


def test_stored_ids_are_taken_verbatim_from_the_same_tokenizer_alone(tiny):
    stored: dict[str, Any] = {"prompt_token_ids": [5, 6, 7], "response_token_ids": [9, 9]}
    tiny.name_or_path = "mine"
    try:
        tokens = tokenize(
            [
                row(action="b", tokenizer_id="mine", **stored),
                row(action="b", tokenizer_id="another", **stored),
                row(action="b", tokenizer_id="mine", **{**stored, "prompt_token_ids": [5] * 300}),
            ],
            tiny,
            max_tokens=100,
        )
    finally:
        tiny.name_or_path = ""
    assert tokens.prompt(0).tolist() == [5, 6, 7]
    assert tokens.response(0).tolist() == [9, 9]
    assert tokens.goal_ptr[0].tolist() == [0, 0]
    assert tiny.decode(tokens.response(1)) == "b" + END
    assert len(tokens.prompt(1)) > 3
    assert len(tokens.prompt(2)) <= 100  # too long to be taken: rendered and cut instead
    assert tokens.prompt(2).tolist() != [5] * 100


def test_saved_tokens_are_read_back(tiny, tmp_path):
    tokens = tokenize([row(observation="x " * 300, action="a"), row(), row(goal="y " * 300)], tiny, max_tokens=60)
    write(tmp_path / "t", [tokens])
    again = Tokens.load(tmp_path / "t")
    assert again.cuts == tokens.cuts
    assert again.fingerprint() == tokens.fingerprint()
    for name in (
        "prompt_ids",
        "branch_ptr",
        "acted",
        "usable",
        "candidate_ptr",
        "candidate_branch",
        "page",
        "goal_ptr",
    ):
        np.testing.assert_array_equal(getattr(again, name), getattr(tokens, name))
    assert tokenize([row(action="b")], tiny).fingerprint() != tokenize([row(action="c")], tiny).fingerprint()


def test_equal_pages_have_equal_numbers(tiny):
    page = tokenize([row(observation="p"), row(observation="q"), row(observation="p", action="a")], tiny).page
    assert (page[0] == page[2], page[0] == page[1]) == (True, False)
