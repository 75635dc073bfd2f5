"""Tokens on disk: what a cache holds is what tokenising everything gives, whatever was copied, and however it broke."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_lm.batches import token_cache, tokens
from offline_lm.batches.token_cache import cached, write
from offline_lm.batches.tokens import Tokens, tokenize
from offline_lm.models.backbone import train_tokenizer

TEXT = "page goal red mug click back alpha beta gamma delta"
OPTIONS = {"max_tokens": 60, "history": 2, "context": "actions"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 4, 400)


def rows_of(episode: str):
    """Steps that differ in all that has a column: candidates, a step too long to use, one with no action."""
    rng = np.random.default_rng(int(episode))
    for t in range(int(rng.integers(1, 5))):
        words = [" ".join(rng.choice(TEXT.split(), int(n))) for n in rng.integers(1, 70, 2)]
        candidates = [{"action": f"a{i}", "response": None, "executed": None} for i in range(int(rng.integers(0, 3)))]
        yield {
            **dict.fromkeys(("start_url", "url", "messages", "observation_error", "response", "tokenizer_id",
                             "prompt_token_ids", "response_token_ids")),
            "episode_id": episode, "goal": words[0] if rng.random() < 0.2 else "red mug", "observation": words[1],
            "action": f"a{t}" if rng.random() < 0.8 else None, "candidates": candidates,
        }  # fmt: skip


class Log:
    """Episodes, and which of them were read."""

    def __init__(self, episodes, contents=None):
        self.episodes = [str(e) for e in episodes]
        self.contents = contents or [f"content of {e}" for e in episodes]
        self.offsets = np.cumsum([0, *(len(list(rows_of(e))) for e in self.episodes)])
        self.read = []

    def steps(self, wanted):
        for e in self.episodes if wanted is None else wanted:
            self.read.append(e)
            yield from rows_of(e)

    def cached(self, root, tokenizer, name="settings"):
        return cached(root, name, self.episodes, self.contents, self.offsets, self.steps, tokenizer, **OPTIONS)


def assert_same(got: Tokens, expected: Tokens):
    for f in fields(Tokens):
        a, b = getattr(got, f.name), getattr(expected, f.name)
        assert a.dtype == b.dtype, f.name
        np.testing.assert_array_equal(a, b, err_msg=f.name)


def whole(log, tokenizer):
    return tokenize((row for e in log.episodes for row in rows_of(e)), tokenizer, **OPTIONS)


@settings(max_examples=25, deadline=None)
@given(
    earlier=st.lists(st.lists(st.integers(0, 12), unique=True, min_size=1), max_size=3),
    now=st.lists(st.integers(0, 12), unique=True, min_size=1),
)
def test_a_grown_cache_is_what_tokenising_everything_gives(tmp_path_factory, tokenizer, earlier, now):
    root = tmp_path_factory.mktemp("cache")
    for episodes in earlier:
        Log(episodes).cached(root, tokenizer)
    log = Log(now)
    assert_same(log.cached(root, tokenizer), whole(log, tokenizer))
    held = max((len(set(now) & set(episodes)) for episodes in earlier), default=0)
    assert len(log.read) in (0, len(now) - held)
    assert_same(Log(now).cached(root, tokenizer), whole(log, tokenizer))


def test_an_id_with_other_content_is_read_again(tmp_path, tokenizer):
    Log([1, 2]).cached(tmp_path, tokenizer)
    log = Log([1, 2], ["content of 1", "what stands there after a repair"])
    log.cached(tmp_path, tokenizer)
    assert log.read == ["2"]


def test_new_episodes_alone_are_read(tmp_path, tokenizer):
    first = Log([3, 1, 2])
    first.cached(tmp_path, tokenizer)
    assert first.read == ["3", "1", "2"]
    again = Log([3, 1, 2])
    again.cached(tmp_path, tokenizer)
    assert again.read == []
    grown = Log([5, 3, 4, 1, 2])
    grown.cached(tmp_path, tokenizer)
    assert grown.read == ["5", "4"]
    other = Log([3])
    other.cached(tmp_path, tokenizer, "another tokenizer")
    assert other.read == ["3"]


def test_an_episode_of_another_length_is_not_copied(tmp_path, tokenizer):
    Log([1, 2]).cached(tmp_path, tokenizer)
    log = Log([1, 2])
    log.offsets[1:] += 1
    log.steps = lambda wanted: (row for e in wanted for row in [*rows_of(e), *([next(rows_of(e))] * (e == "1"))])
    tokens = log.cached(tmp_path, tokenizer)
    assert len(tokens) == log.offsets[-1]


def test_a_broken_run_leaves_nothing_and_the_next_begins_again(tmp_path, tokenizer):
    log = Log([1, 2, 3])
    fine = log.steps

    def broken(wanted):
        for n, row in enumerate(fine(wanted)):
            if n == 2:
                raise KeyboardInterrupt
            yield row

    log.steps = broken
    with pytest.raises(KeyboardInterrupt):
        log.cached(tmp_path, tokenizer)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    log.steps = fine
    assert_same(log.cached(tmp_path, tokenizer), whole(log, tokenizer))


def test_a_folder_without_its_last_file_is_no_cache(tmp_path, tokenizer):
    Log([1, 2]).cached(tmp_path, tokenizer)
    (meta,) = tmp_path.rglob("meta.json")
    meta.unlink()
    log = Log([1, 2, 4])
    log.cached(tmp_path, tokenizer)
    assert log.read == ["1", "2", "4"]


def test_two_runs_at_once_agree(tmp_path, tokenizer):
    log, other = Log([1, 2]), Log([1, 2])

    def meanwhile(wanted):
        other.cached(tmp_path, tokenizer)
        yield from (row for e in other.episodes for row in rows_of(e))

    log.steps = meanwhile
    assert_same(log.cached(tmp_path, tokenizer), whole(log, tokenizer))


@pytest.mark.parametrize("steps", [1, 3, 512])
def test_parts_do_not_show(tmp_path, tokenizer, steps, monkeypatch):
    log = Log(range(9))
    expected = whole(log, tokenizer)
    monkeypatch.setattr(tokens, "_CHUNK_STEPS", steps)
    monkeypatch.setattr(tokens, "_CHUNK_TEXT", 300)
    monkeypatch.setattr(token_cache, "_COPIED", 2)
    assert_same(log.cached(tmp_path, tokenizer), expected)
    Log([*range(9), 11]).cached(tmp_path, tokenizer)
    assert_same(whole(log, tokenizer), expected)


def test_a_part_and_the_join_of_parts(tokenizer, tmp_path):
    log = Log(range(8))
    expected = whole(log, tokenizer)
    n = len(expected)
    assert_same(Tokens.joined([expected.part(0, 3), expected.part(3, 3), expected.part(3, n)]), expected)
    write(tmp_path / "t", [expected.part(2, 7)])
    assert_same(Tokens.load(tmp_path / "t"), expected.part(2, 7))
    assert expected.part(2, 7).prompt(1).tolist() == expected.prompt(3).tolist()
    assert expected.cuts.pages > 0
    assert expected.cuts.too_long == (~expected.usable).sum() > 0
    nothing = tokenize([], tokenizer)
    assert (len(nothing), nothing.n_tokens, len(nothing.prompt_ptr)) == (0, 0, 1)
