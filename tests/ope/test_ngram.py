"""The n-gram baseline: what it counts, that it is logistic regression, and that it learns words and nothing else."""

from zlib import crc32

import numpy as np
import pytest
from scipy.sparse import csr_array

from offline_lm.ope import ngram


def dense(texts):
    return ngram.bag(texts, buckets=1 << 12).toarray()


def test_a_text_is_its_words_and_pairs_in_rows_of_length_one():
    (row,) = dense([["Red mug, red"]])
    assert np.count_nonzero(row) == 4  # red, mug, "red mug", "mug red": neither case nor repeats count
    assert row[row > 0] == pytest.approx(0.5)
    same, turned, other_field = dense([["red MUG red"], ["mug red mug"], ["", "red mug red"]])
    assert (row == same).all()
    assert row @ turned == pytest.approx(1.0)  # the same words and pairs
    assert row @ dense([["red red mug"]])[0] == pytest.approx(3 / 4)  # red, mug, "red mug" of four; "red red" is new
    assert row @ other_field == 0  # words of a page are not those of a goal
    assert (dense([["", None]]) == 0).all()


def test_hashes_do_not_change_between_processes():
    (row,) = dense([["red"]])
    code = crc32(b"0 red")
    assert np.flatnonzero(row).tolist() == [(code ^ (code >> 17)) % (1 << 12)]


def test_logistic_is_at_the_least_of_its_loss():
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(60, 3)), (rng.random(60) < 0.4).astype(float), rng.random(60)
    w = ngram.logistic(csr_array(x), y, weight, 0.1, np.zeros(4))
    p = 1 / (1 + np.exp(-(x @ w[:3] + w[3])))
    share = weight / weight.sum()
    assert x.T @ (share * (p - y)) + 0.1 * w[:3] == pytest.approx(0, abs=1e-4)
    assert share @ (p - y) == pytest.approx(0, abs=1e-4)  # the intercept is free: the mean is the weighted rate
    linear_model = pytest.importorskip("sklearn.linear_model")
    peer = linear_model.LogisticRegression(C=1 / 0.1, tol=1e-8).fit(x, y, sample_weight=share)
    assert w == pytest.approx(np.r_[peer.coef_[0], peer.intercept_], abs=1e-3)


def drawn(rng, n, *, told):
    """Pages of three words; where `told`, one of them says how it ends."""
    noise = rng.integers(0, 20, (n, 3))
    won = rng.random(n) < 0.5
    texts = [
        [" ".join([f"word{i}" for i in row] + ([("good" if w else "bad")] if told else []))]
        for row, w in zip(noise, won, strict=True)
    ]
    return texts, won.astype(float)


@pytest.mark.parametrize(("told", "low", "high"), [(True, 0.95, 1.0), (False, 0.3, 0.65)])
def test_it_predicts_what_words_tell(told, low, high):
    rng = np.random.default_rng(0)
    (texts, won), (asked, truth) = drawn(rng, 200, told=told), drawn(rng, 100, told=told)
    p = ngram.predict(ngram.bag(texts), won, np.ones(200), np.arange(200) % 10, ngram.bag(asked))
    assert low <= np.mean((p > 0.5) == truth) <= high


def test_the_penalty_is_chosen_by_tasks_that_were_left_out():
    # a word names the task and all outcomes of it: within a task it tells everything, of another task nothing
    texts = [[f"name{task} page"] for task in range(30) for _ in range(4)]
    won = np.repeat(np.random.default_rng(0).random(30) < 0.5, 4).astype(float)
    p = ngram.predict(ngram.bag(texts), won, np.ones(120), np.repeat(np.arange(30), 4), ngram.bag([["page"]]))
    seen = ngram.predict(ngram.bag(texts), won, np.ones(120), np.repeat(np.arange(30), 4), ngram.bag(texts))
    assert p[0] == pytest.approx(won.mean(), abs=0.02)
    assert np.abs(seen - won.mean()).max() < 0.1  # rows put aside without regard to tasks would choose to trust it
    careless = ngram.predict(ngram.bag(texts), won, np.ones(120), np.arange(120), ngram.bag(texts))
    assert np.abs(careless - won).max() < 0.2


def test_a_single_task_and_a_single_outcome():
    texts = [["red"], ["blue"]]
    p = ngram.predict(ngram.bag(texts), np.array([1.0, 0.0]), np.ones(2), np.zeros(2, int), ngram.bag(texts))
    assert p[0] > 0.5 > p[1]
    sure = ngram.predict(ngram.bag(texts), np.ones(2), np.ones(2), np.arange(2), ngram.bag([["green"]]))
    assert 0.99 < sure[0] <= 1
