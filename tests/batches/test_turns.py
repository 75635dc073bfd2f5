"""Prompts that show whole past turns: each goes on from the one before, until the oldest are dropped in blocks."""

import numpy as np
import pytest

from offline_lm.batches import pack as packing
from offline_lm.batches import render
from offline_lm.batches.pack import pack
from offline_lm.batches.tokens import common_prefix, tokenize
from offline_lm.models.backbone import train_tokenizer

WORDS = "alpha beta gamma delta epsilon zeta eta theta click back search page red mug Goal Did Page URL Action"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS] * 4, 400)


def step(t, episode="e", *, page=12, action: str | None = "", **columns):
    words = np.random.default_rng(t).choice(WORDS.split(), page)
    return {
        "goal": "red mug", "start_url": None, "url": f"u{t}", "observation": " ".join(words), "messages": None,
        "observation_error": None, "response": None, "action": f"click {t}" if action == "" else action,
        "candidates": [], "tokenizer_id": None, "prompt_token_ids": None, "response_token_ids": None,
        "episode_id": episode, **columns,
    }  # fmt: skip


def shown(tokens, n, tokenizer):
    """The prompt behind the token that begins it."""
    start, text = render.frame(tokenizer).before, tokenizer.decode(tokens.prompt(n))
    assert text.count(start) == 1
    assert text.startswith(start)
    return text.removeprefix(start)


def turns(steps, tokenizer, max_tokens=10_000):
    return tokenize(steps, tokenizer, max_tokens=max_tokens, context="turns")


def test_a_prompt_is_the_past_pages_and_actions_then_the_page_and_the_goal(tokenizer):
    steps = [step(0), step(1, response="I think so"), step(2, action=None), step(0, "f")]
    tokens = turns(steps, tokenizer)
    pages = [render.page_text(s) for s in steps]
    end = "\nGoal: red mug" + render.frame(tokenizer).after
    assert shown(tokens, 0, tokenizer) == pages[0] + end
    assert shown(tokens, 1, tokenizer) == f"{pages[0]}\nDid: click 0\n{pages[1]}{end}"
    assert shown(tokens, 2, tokenizer) == f"{pages[0]}\nDid: click 0\n{pages[1]}\nDid: click 1\n{pages[2]}{end}"
    assert shown(tokens, 3, tokenizer) == pages[3] + end
    for n in range(4):
        start, stop = tokens.goal_ptr[n]
        assert tokenizer.decode(tokens.prompt(n)[start:stop]) == "\nGoal: red mug"
    assert tokens.cuts == render.Cuts()


def test_prompts_share_all_but_goal_and_frame_and_one_pass_encodes_the_episode(tokenizer, monkeypatch):
    tokens = turns([step(t) for t in range(6)], tokenizer)
    goal, after = "\nGoal: red mug", render.frame(tokenizer).after
    tail = len(tokenizer(goal)["input_ids"]) + len(tokenizer(after)["input_ids"]) - 1  # an action too begins a line
    for n in range(5):
        assert common_prefix(tokens.prompt(n), tokens.prompt(n + 1)) == len(tokens.prompt(n)) - tail
    monkeypatch.setattr(packing, "_LEAST", 8)
    monkeypatch.setattr("offline_lm.batches.tokens.COMPARED", 8)
    ids, layout = pack(tokens, range(6), [[n] for n in range(6)])
    own = sum(tail + len(tokens.response(n)) for n in range(5))
    assert layout.trunks.tolist() == [len(tokens.prompt(5)) + len(tokens.response(5))]
    assert len(ids) == layout.trunks[0] + own


def test_the_oldest_turns_are_dropped_in_blocks_and_the_newest_action_never_is(tokenizer):
    steps = [step(t) for t in range(30)]
    room = 400
    tokens = turns(steps, tokenizer, room)
    lengths = np.diff(tokens.prompt_ptr)
    assert tokens.usable.all()
    assert lengths.max() <= room
    assert lengths.max() > 0.7 * room
    shared = [common_prefix(tokens.prompt(n), tokens.prompt(n + 1)) for n in range(29)]
    dropped = [n + 1 for n in range(29) if shared[n] < lengths[n] / 2]
    assert 1 < len(dropped) < 8
    assert all(lengths[n] <= room // 2 for n in dropped)
    for n in range(1, 30):
        text = shown(tokens, n, tokenizer)
        assert f"\nDid: click {n - 1}\nURL: u{n}\n" in text
        said = [t for t in range(n) if f"Did: click {t}\n" in text]
        assert said == list(range(said[0], n))  # no gap
        assert [f"URL: u{t}\n" in text for t in said] == [said[0] == 0, *[True] * (len(said) - 1)]
        assert text.endswith("\nGoal: red mug" + render.frame(tokenizer).after)
    assert tokens.cuts == render.Cuts(histories=30 - dropped[0])


def test_a_page_that_leaves_no_room_for_turns_stands_behind_the_newest_action(tokenizer):
    steps = [step(0), step(1), step(2, page=400), step(3), step(4, action="theta " * 300), step(5)]
    tokens = turns(steps, tokenizer, 300)
    text = shown(tokens, 2, tokenizer)
    assert text.startswith("\nDid: click 1\nURL: u2\n")
    assert len(tokens.prompt(2)) == 300
    assert shown(tokens, 3, tokenizer).startswith("\nDid: click 2\nURL: u3\n")
    assert tokens.usable.tolist() == [True] * 5 + [False]
    assert (tokens.cuts.pages, tokens.cuts.too_long) == (1, 1)


@pytest.mark.parametrize("max_tokens", [150, 400, 10_000])
def test_a_step_that_brings_its_past_reads_as_it_does_in_its_episode(tokenizer, max_tokens):
    steps = [step(t, page=10 + 7 * (t % 3)) for t in range(14)]
    whole = turns(steps, tokenizer, max_tokens)
    alone = [step(t, str(t), page=10 + 7 * (t % 3)) | {"past": steps[:t]} for t in range(14)]
    lone = turns(alone, tokenizer, max_tokens)
    for n in range(14):
        assert lone.prompt(n).tolist() == whole.prompt(n).tolist()


def test_past_actions_without_pages_are_turns_too(tokenizer):
    past = ["click 0", {"url": "u", "observation": "p", "response": "so", "action": None}]
    tokens = turns([step(1) | {"past": past}], tokenizer)
    assert shown(tokens, 0, tokenizer).startswith("\nDid: click 0\nURL: u\nPage:\np\nDid: so\nURL: u1\n")
