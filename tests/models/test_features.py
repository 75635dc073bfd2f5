"""The cache of features: equal to separate passes, found by content, whole after a kill, refused where it is not."""

import copy
import json
import multiprocessing
import os
import signal
import threading
from contextlib import suppress

import numpy as np
import orjson
import pytest
import torch

from offline_lm import fit, ingest
from offline_lm.batches.tokens import tokenize
from offline_lm.envs.shop import Site, Task, record
from offline_lm.errors import UserError
from offline_lm.models import backbone, feature_cache, features
from offline_lm.models.feature_cache import FeatureCache, Rows
from offline_lm.store import Store


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "features"


def alone(model, tokens):
    """(v, q) by a pass of transformers for every prompt, and for every prompt with a response."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("sdpa")

    def last(ids):
        ids = torch.from_numpy(np.concatenate(ids).astype(np.int64))
        return model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1]

    v, q = [], []
    with torch.no_grad():
        for n in range(len(tokens)):
            prompt = tokens.prompt(n)
            v.append(last([prompt]))
            q += [last([prompt, tokens.response(a)]) for a in range(tokens.branch_ptr[n], tokens.branch_ptr[n + 1])]
    return torch.stack(v).float().numpy(), torch.stack(q).float().numpy()


def tokens_of(shop, rows, **options):
    return tokenize(rows, shop.tokenizer, **{"max_tokens": 400, "history": 2, **options})


def counted(into):
    """A `progress` that notes how many states every pass encodes."""

    def progress(spans):
        for span in spans:
            into.append(len(span))
            yield span

    return progress


def forbidden(spans):
    pytest.fail(f"{sum(map(len, spans))} states are encoded again")


def the_folder(cache):
    (folder,) = cache.iterdir()
    return folder


@pytest.mark.parametrize("token_budget", [1, 900, 100_000])
def test_features_are_those_of_separate_passes(shop, cache, token_budget):
    got = features.compute(shop.model, shop.tokens, cache, token_budget=token_budget)
    v, q = alone(shop.model, shop.tokens)
    assert got.v.shape == v.shape == (len(shop.rows), 16)
    assert got.q.shape == q.shape
    np.testing.assert_allclose(got.v, v, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.q, q, rtol=0, atol=1e-5)


def test_rows_are_an_array(shop, cache):
    got = features.compute(shop.model, shop.tokens, cache).q
    whole = np.asarray(got)
    assert whole.dtype == np.float32
    mask = np.arange(len(got)) % 3 == 0
    for rows in (5, slice(2, 9), np.array([7, 1, 1]), mask, [3, 4]):
        np.testing.assert_array_equal(got[rows], whole[rows])
    assert isinstance(got, Rows)
    np.testing.assert_array_equal(got.resident().numpy(), whole)
    assert got.nbytes == whole.nbytes
    picked = got[np.array([1])]
    picked[:] = 0  # a copy: the cache stays as it is
    assert (got[1] == whole[1]).all()


def test_stored_as_bfloat16(shop, cache):
    exact = features.compute(shop.model, shop.tokens, cache)
    short = features.compute(shop.model, shop.tokens, cache, dtype="bfloat16")
    for ours, wanted in ((short.v, exact.v), (short.q, exact.q)):
        rounded = torch.from_numpy(wanted[:]).bfloat16()
        np.testing.assert_array_equal(ours[:], rounded.float().numpy())
        assert isinstance(ours, Rows)
        assert ours.resident().dtype == torch.bfloat16
        assert torch.equal(ours.resident(), rounded)
        assert ours.nbytes * 2 == wanted.nbytes
    assert len(list(cache.iterdir())) == 2  # a folder each: neither is taken for the other


def test_a_bfloat16_backbone(shop, cache):
    """8 bits of mantissa through two layers: within 5 % of the size of the features."""
    exact = features.compute(shop.model, shop.tokens, cache)
    model = copy.deepcopy(shop.model).bfloat16()
    short = features.compute(model, shop.tokens, cache)
    for ours, wanted in ((short.v[:], exact.v[:]), (short.q[:], exact.q[:])):
        error = np.linalg.norm(ours - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert 0 < error.max() < 0.05


def test_what_is_there_is_not_encoded_again(shop, cache):
    first = features.compute(shop.model, shop.tokens, cache)
    again = features.compute(shop.model, shop.tokens, cache, progress=forbidden)
    np.testing.assert_array_equal(again.v[:], first.v[:])
    np.testing.assert_array_equal(again.q[:], first.q[:])


def test_a_store_that_grew_and_another_selection(shop, cache):
    """Only states that are not there are encoded, whatever the order and the width of ids."""
    few, many = tokens_of(shop, shop.rows[:20]), tokens_of(shop, shop.rows[10:][::-1])
    features.compute(shop.model, few, cache)
    passes = []
    got = features.compute(shop.model, many, cache, token_budget=500, progress=counted(passes))
    prompts = {few.prompt(n).tobytes() for n in range(len(few))}
    new = {many.prompt(n).tobytes() for n in range(len(many))} - prompts
    assert sum(passes) == len(new) < len(many)
    v, q = alone(shop.model, many)
    np.testing.assert_allclose(got.v, v, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.q, q, rtol=0, atol=1e-5)
    wide = copy.copy(many)
    object.__setattr__(wide, "prompt_ids", many.prompt_ids.astype(np.uint32))
    features.compute(shop.model, wide, cache, progress=forbidden)


def test_equal_states_are_encoded_once_and_new_actions_are_added(shop, cache):
    page = {**shop.rows[0], "episode_id": "e"}
    rows = [
        {**page, "episode_id": str(i), "candidates": [], "response": None, "action": action}
        for i, action in enumerate(("back", "click[a]", "back", "search[b c]"))
    ]
    tokens = tokens_of(shop, rows)
    passes = []
    got = features.compute(shop.model, tokens, cache, token_budget=1, progress=counted(passes))
    assert sum(passes) == 1
    v, q = alone(shop.model, tokens)
    np.testing.assert_allclose(got.v, v, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.q, q, rtol=0, atol=1e-5)
    assert json.loads((the_folder(cache) / "index.json").read_text())["rows"] == 1 + 3
    more = tokens_of(shop, [*rows, {**rows[0], "episode_id": "5", "action": "new"}])
    got = features.compute(shop.model, more, cache)
    np.testing.assert_allclose(got.q, alone(shop.model, more)[1], rtol=0, atol=1e-5)
    assert json.loads((the_folder(cache) / "index.json").read_text())["rows"] == 1 + 4  # V was there


def test_an_interrupted_run_keeps_what_it_encoded(shop, cache):
    def three(spans):
        for span, _ in zip(spans, range(3), strict=False):
            yield span
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        features.compute(shop.model, shop.tokens, cache, token_budget=300, progress=three)
    kept = json.loads((the_folder(cache) / "index.json").read_text())["rows"]
    assert kept > 0
    passes = []
    got = features.compute(shop.model, shop.tokens, cache, token_budget=300, progress=counted(passes))
    whole = json.loads((the_folder(cache) / "index.json").read_text())["rows"]
    assert kept < whole
    fresh = []
    features.compute(shop.model, shop.tokens, cache / "other", token_budget=300, progress=counted(fresh))
    assert sum(passes) < sum(fresh)
    np.testing.assert_allclose(got.v, alone(shop.model, shop.tokens)[0], rtol=0, atol=1e-5)


def killed_after(shop, cache, passes):
    def kill(spans):
        for i, span in enumerate(spans):
            if i == passes:
                os.kill(os.getpid(), signal.SIGKILL)
            yield span

    features.compute(shop.model, shop.tokens, cache, token_budget=300, progress=kill)


@pytest.mark.parametrize("every", [0.0, 3600.0])
def test_a_killed_run_is_gone_on_with(shop, cache, monkeypatch, every):
    monkeypatch.setattr(feature_cache, "COMMIT_S", every)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=killed_after, args=(shop, cache, 4))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    kept, whole = [], []
    got = features.compute(shop.model, shop.tokens, cache, token_budget=300, progress=counted(kept))
    features.compute(shop.model, shop.tokens, cache / "other", token_budget=300, progress=counted(whole))
    assert (sum(kept) < sum(whole)) == (every == 0)  # a kill costs what was not indexed yet, and no more
    v, q = alone(shop.model, shop.tokens)
    np.testing.assert_allclose(got.v, v, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.q, q, rtol=0, atol=1e-5)


def test_two_at_once_encode_once(shop, cache):
    passes, results, errors = [], [], []

    def work():
        try:
            results.append(features.compute(shop.model, shop.tokens, cache, token_budget=300, progress=counted(passes)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    once = []
    features.compute(shop.model, shop.tokens, cache / "other", token_budget=300, progress=counted(once))
    assert sum(passes) == sum(once)
    for got in results:
        np.testing.assert_array_equal(got.v[:], results[0].v[:])
        np.testing.assert_array_equal(got.q[:], results[0].q[:])


def test_a_reader_keeps_its_rows_while_others_append(shop, cache):
    first = features.compute(shop.model, tokens_of(shop, shop.rows[:5]), cache)
    before = first.v[:]
    features.compute(shop.model, shop.tokens, cache)
    np.testing.assert_array_equal(first.v[:], before)


def other_weights(folder):
    index = json.loads((folder / "index.json").read_text())
    index["of"]["weights"] = "0" * 64
    (folder / "index.json").write_text(json.dumps(index))


def other_dtype(folder):
    index = json.loads((folder / "index.json").read_text())
    index["of"]["dtype"] = "bfloat16"
    (folder / "index.json").write_text(json.dumps(index))


def shortened(name):
    def damage(folder):
        os.truncate(folder / name, (folder / name).stat().st_size - 1)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_weights, "holds features of something else .weights 0000"),
        (other_dtype, "dtype bfloat16 where float32 is asked for"),
        (shortened("rows.bin"), r"is damaged: rows\.bin has \d+ bytes where \d+ rows take"),
        (shortened("keys.bin"), r"is damaged: keys\.bin has"),
        (lambda folder: (folder / "rows.bin").unlink(), r"is damaged: rows\.bin has 0 bytes"),
        (lambda folder: (folder / "index.json").write_text("{"), r"index\.json that is damaged"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(shop, cache, damage, message):
    features.compute(shop.model, shop.tokens, cache)
    folder = the_folder(cache)
    damage(folder)
    with pytest.raises(UserError, match=message) as told:
        features.compute(shop.model, shop.tokens, cache)
    assert str(folder) in str(told.value)
    assert "remove this folder" in str(told.value)


def test_rows_behind_the_index_are_written_over(cache):
    made = FeatureCache(cache, {}, 2, "float32")
    keys = np.array([b"a" * 16, b"b" * 16, b"c" * 16])
    with made.appending() as appender:
        appender.add(keys[:2], torch.tensor([[1.0, 2], [3, 4]]))
    with (cache / "rows.bin").open("ab") as file:  # what a kill leaves
        file.write(b"\0" * 5)
    with made.appending() as appender:
        appender.add(keys[2:], torch.tensor([[5.0, 6]]))
    again = FeatureCache(cache, {}, 2, "float32")
    at = again.find(np.array([b"c" * 16, b"x" * 16, b"a" * 16]))
    assert at.tolist() == [2, -1, 0]
    assert again.stored[at[[0, 2]]].tolist() == [[5, 6], [1, 2]]


def test_what_is_not_finite_is_not_kept(cache):
    made = FeatureCache(cache, {}, 1, "float32")
    with pytest.raises(FloatingPointError, match=r"model\.dtype=float32"), made.appending() as appender:
        appender.add(np.array([b"a" * 16]), torch.tensor([[torch.inf]]))
    assert not (cache / "index.json").exists()


def test_a_folder_that_cannot_be_written_is_the_users_mistake(shop, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        features.compute(shop.model, shop.tokens, tmp_path / "file")


def test_the_fingerprint_tells_weights_and_configurations_apart(shop):
    other = copy.deepcopy(shop.model)
    same = features.fingerprint(shop.model)
    assert features.fingerprint(other) == same
    other.config._name_or_path = "elsewhere"
    assert features.fingerprint(other) == same
    other.config.rms_norm_eps *= 2
    assert features.fingerprint(other) != same
    other = copy.deepcopy(shop.model)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    assert features.fingerprint(other) != same
    assert features.fingerprint(copy.deepcopy(shop.model).bfloat16()) != same


def test_fit_keeps_features_as_it_is_told(shop, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\n".join(orjson.dumps(e) for e in record([Task(Site.draw(0), n) for n in range(3)], 2)))
    store = tmp_path / "store"
    assert ingest.main([f"path={log}", f"store={store}"]) == 0
    backbone.save(shop.model, shop.tokenizer, tmp_path / "backbone")
    small = ["model=hf", f"model.path={tmp_path / 'backbone'}", "optim.steps=3", "threads=1", "baselines=false"]
    kept = {}
    for dtype in ("float32", "bfloat16"):
        arguments = [f"data.store={store}", "algo=q_mc", "logger=none", *small, f"model.features={dtype}"]
        assert fit.main([*arguments, "json=true"]) == 0
        run = json.loads(capsys.readouterr().out.splitlines()[-1])["run_id"]
        with Store.open(store).connect() as db:
            kept[dtype] = db.execute(
                'SELECT q FROM "values" WHERE run_id = ? AND q IS NOT NULL ORDER BY episode_id, step', [run]
            ).fetchall()
    folders = (store / "cache" / "features").iterdir()
    assert sorted(json.loads((f / "index.json").read_text())["of"]["dtype"] for f in folders) == ["bfloat16", "float32"]
    exact, short = (np.array(kept[dtype])[:, 0] for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - short).max() < 0.02
    assert fit.main([f"data.store={store}", *small, "model.features=float16"]) == 2
    assert "model.features=float16: one of float32, bfloat16 is wanted" in capsys.readouterr().err
