"""Agent Data Protocol: the real samples, and what is said back by `write` is what was read."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.logs import adp
from offline_lm.logs._adapters import Sample
from offline_lm.store.rows import convert
from offline_lm.types import Episode, Rejected, Step

TREE = "Tab 0 (current): Shop\n\n[1] RootWebArea 'Shop'\n\t[4] link 'Mugs'"


def text(content, source="user", **more):
    return {"class_": "text_observation", "content": content, "name": None, "source": source} | more


def page(**fields):
    whole = {"html": None, "axtree": None, "url": None, "image_observation": None, "viewport_size": None}
    return {"class_": "web_observation"} | whole | fields


def image(content):
    return {"class_": "image_observation", "content": content, "annotations": None, "source": "environment"}


def api(function, description: str | None = "why", **kwargs):
    return {"class_": "api_action", "function": function, "kwargs": kwargs, "description": description}


def message(content, description: str | None = ""):
    return {"class_": "message_action", "content": content, "description": description}


def code(content, language="bash"):
    return {"class_": "code_action", "language": language, "content": content, "description": None}


def read(tmp_path, *rows, name="sample_std.json") -> list[Any]:
    path = tmp_path / name
    path.write_text(json.dumps(rows))
    return list(logs.read("adp", path))


def one(tmp_path, *content, **more) -> Episode:
    (episode,) = read(tmp_path, {"id": "a", "content": list(content), "details": {}} | more)
    assert isinstance(episode, Episode), episode
    return episode


def without_pictures(episode: Episode) -> Episode:
    """As the store has it once it has put the pictures away."""
    kept = ("sha256", "mime", "status")
    shots = [{k: s.screenshot[k] for k in kept} if s.screenshot else None for s in episode.steps]
    return replace(episode, steps=tuple(replace(s, screenshot=x) for s, x in zip(episode.steps, shots, strict=True)))


def plain(value: Any) -> Any:
    """Without what is null or empty: the samples leave out now one, now the other."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if v is not None and v != []}
    return [plain(v) for v in value] if isinstance(value, list) else value


# --- the real samples ---------------------------------------------------------------------------------------

EPISODES = {  # folder: (episodes, steps) of sample_std.json
    "agenttuning_mind2web": (3, 3),
    "agenttuning_webshop": (3, 16),
    "eto": (3, 15),
    "go-browse-wa": (3, 18),
    "nnetnav-live": (3, 19),
    "nnetnav-wa": (3, 24),
    "openhands": (2, 43),
    "webarena_successful": (6, 8),
}
IN_PROVENANCE = (44, 242)
RAW = {  # folder: (episodes, steps) of sample_raw.json, other formats: who reads them stands in the comment
    "agenttuning_mind2web": (3, 3),  # conversations[{role, content}]: source=chat
    "agenttuning_webshop": (3, 13),  # the same; std adds a <finish> to each
    "eto": (3, 15),  # conversations[{from, value}] and a reward: source=chat
    "nnetnav-live": (3, 19),  # a row for each step, the prompt as text: source=chat
    "nnetnav-wa": (3, 38),  # the same; longer than its std, which is cut
    # Pages and actions in turn, PROVENANCE counts both; objects as Python's repr, which is no data: read by nobody.
    "webarena_successful": (3, 8),
}


def test_every_real_sample(shared_data):
    counted = {}
    for folder in sorted(p for p in (shared_data / "adp").iterdir() if p.is_dir()):
        found = list(logs.read("adp", folder))
        episodes = [e for e in found if isinstance(e, Episode)]
        assert episodes == found  # nothing is quarantined
        for episode in episodes:
            assert episode.dataset == folder.name
            assert episode.quality_flags == ("unlabelled",)
            assert (episode.outcome_reward, episode.success, episode.terminated) == (None, None, None)
            assert all(step.reward is None for step in episode.steps)
            assert convert(episode, "i").n_steps == len([s for s in episode.steps if not s.is_final_observation])
        steps = sum(not s.is_final_observation for e in episodes for s in e.steps)
        counted[folder.name] = (len(episodes), steps)
    assert counted == EPISODES
    assert tuple(map(sum, zip(*EPISODES.values(), strict=True))) == (26, 146)


def test_what_provenance_counts_beside(shared_data):
    """PROVENANCE counts raw and std of the same episode both; the std rows here, the raw ones by their own shape."""
    counted = {}
    for file in sorted((shared_data / "adp").glob("*/sample_raw.json")):
        rows = json.loads(file.read_bytes())
        names = {row.get("id", i) if "prompt" in row else i for i, row in enumerate(rows)}
        steps = 0
        for row in rows:
            said = row.get("conversations", ())
            steps += sum(turn.get("role", turn.get("from")) in ("assistant", "gpt") for turn in said)
            steps += "prompt" in row
            steps += len(row.get("trajectory", ()))
        counted[file.parent.name] = (len(names), steps)
        assert adp.detect(Sample(file)) is None
    assert counted == RAW
    totals = [sum(values) for values in zip(*EPISODES.values(), *RAW.values(), strict=True)]
    assert tuple(totals) == IN_PROVENANCE


def test_write_gives_back_the_real_samples(shared_data):
    for file in sorted((shared_data / "adp").glob("*/sample_std.json")):
        rows = json.loads(file.read_bytes())
        for row, episode in zip(rows, logs.read("adp", file), strict=True):
            assert isinstance(episode, Episode)
            written, lost = adp.write(episode)
            if "#" in episode.native_id:
                assert lost == ["task_id"]
                written["id"] = episode.task_id
            else:
                assert lost == []
            assert plain(written) == plain({"id": str(row["id"])} | row)


def test_repeated_ids(shared_data):
    """webarena_successful: six rows with the id 0, three of them distinct."""
    found = [e for e in logs.read("adp", shared_data / "adp" / "webarena_successful") if isinstance(e, Episode)]
    assert {e.task_id for e in found} == {"0"}
    names = [e.native_id for e in found]
    assert names[0] == names[1] == names[3] == "0"
    assert names[2] == names[4] != "0"
    assert len(set(names)) == len({e.sha256 for e in found}) == 3


def test_axtree_in_html(shared_data):
    first = next(logs.read("adp", shared_data / "adp" / "webarena_successful"))
    assert isinstance(first, Episode)
    step = first.steps[0]
    assert step.observation_kind == "axtree"
    assert step.observation is not None
    assert step.observation.startswith("Tab 0 (current): Dashboard / Magento Admin")
    assert step.screenshot == {"sha256": None, "mime": None, "status": "missing"}
    assert step.extra is not None
    assert step.extra["web"]["field"] == "html"
    assert step.extra["web"]["viewport_size"] == [1280, 720]
    assert step.action == 'stop(answer="Quest Lumaflex™ Band")'
    assert first.goal == "What is the top-1 best-selling product in 2022"


# --- the rules ----------------------------------------------------------------------------------------------


def test_observations_are_joined_and_actions_are_steps(tmp_path):
    shop = page(axtree="[1] button", url="http://a/1")
    got = one(tmp_path, text("Buy a mug"), shop, api("click", bid="1"), code("ls"), text("a.txt", "environment"))
    first, second, final = got.steps
    assert (first.observation, first.observation_kind, first.url) == ("[1] button", "axtree", "http://a/1")
    assert first.messages is None
    assert (first.action, first.action_name, first.thought) == ('click(bid="1")', "click", "why")
    assert (second.observation, second.action, second.action_grammar, second.action_name) == ("", "ls", "code", "bash")
    assert (final.observation, final.is_final_observation, final.action) == ("a.txt", True, None)
    assert got.goal == "Buy a mug"
    assert got.start_url == "http://a/1"
    assert got.quality_flags == ("unlabelled", "missing_observations")


def test_several_texts(tmp_path):
    said = [text("go"), text("a", "environment"), text("b", "environment")]
    got = one(tmp_path, *said, code("ls"), text("c"), page(axtree="x"), code("ls"))
    first, second = got.steps
    assert got.goal == "go"
    assert (first.observation, first.observation_kind) == (None, "messages")
    assert json.loads(first.messages or "") == [{"role": "environment", "content": t} for t in "ab"]
    assert (second.observation, json.loads(second.messages or "")) == ("x", [{"role": "user", "content": "c"}])


def test_markup_stays_html(tmp_path):
    kinds = [
        one(tmp_path, page(html=h), api("noop")).steps[0].observation_kind for h in ("<div>a</div>", TREE, "a < b")
    ]
    assert kinds == ["html", "axtree", "axtree"]


def test_arguments_quoted_twice(tmp_path):
    step = one(tmp_path, text("x"), api("fill", bid='"158"', value='"a \\"b\\""', n="0", odd='"a" or "b"')).steps[0]
    assert step.action_args == {"bid": "158", "value": 'a "b"', "n": "0", "odd": '"a" or "b"'}
    assert step.extra is not None
    assert step.extra["quoted"] == ["bid", "value"]


def test_finish(tmp_path):
    got = one(tmp_path, text("x"), message("<finish> 42 \n</finish>", "done"))
    assert (got.final_answer, got.steps[0].action) == ("42", "<finish> 42 \n</finish>")
    assert (got.terminated, got.end_reason) == (None, None)


def test_screenshots(tmp_path):
    png = b"\x89PNG\r\n\x1a\n" + bytes(10)
    (tmp_path / "screenshots").mkdir()
    (tmp_path / "screenshots" / "a.png").write_bytes(png)
    (tmp_path / "secret.png").write_bytes(png)
    encoded = "data:image/png;base64,iVBORw0KGgo="
    names = ("datasets/x/screenshots/a.png", "../secret.png", "https://a/b.png", "x" * 300, "a\0", "..", encoded)
    shots = [one(tmp_path, page(axtree="a", image_observation=image(n)), api("noop")).steps[0] for n in names]
    assert [s.screenshot and s.screenshot["status"] for s in shots] == ["ok", *["missing"] * 5, "ok"]
    assert "base64" not in json.dumps([s.extra for s in shots])


def test_details_and_dataset(tmp_path):
    got = one(tmp_path, text("x"), code("ls"), details={"feedback": "positive"})
    assert got.extra == {"details": {"feedback": "positive"}}
    assert got.dataset == tmp_path.name
    (other,) = read(tmp_path, {"id": 3, "content": [text("x"), code("ls")]}, name="mine.json")
    assert (other.dataset, other.native_id) == ("mine", "3")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not_an_object"),
        ({"content": []}, "missing_key"),
        ({"id": "a"}, "missing_key"),
        ({"id": "a", "content": {}}, "wrong_type"),
        ({"id": "a", "content": []}, "no_steps"),
        ({"id": "a", "content": [text("x")]}, "no_steps"),
        ({"id": "a", "content": [7]}, "wrong_type"),
        ({"id": "a", "content": [{"class_": "dance"}]}, "bad_value"),
        ({"id": "a", "content": [text(None), code("ls")]}, "missing_key"),
        ({"id": "a", "content": [text("x"), api("f") | {"kwargs": []}]}, "wrong_type"),
        ({"id": "a", "content": [text("x"), code(None)]}, "missing_key"),
        ({"id": "a", "content": [page(axtree=4), code("ls")]}, "wrong_type"),
        ({"id": "a", "content": [text("x"), code("ls")], "details": 3}, "wrong_type"),
    ],
)
def test_rejected(tmp_path, row, reason):
    (got,) = read(tmp_path, row)
    assert isinstance(got, Rejected)
    assert got.reason == reason


# --- writing ------------------------------------------------------------------------------------------------


def test_write_names_what_it_cannot_say():
    step = Step(step=0, observation="a page", observation_kind="text", action="click[4]", reward=1.0, terminated=True)
    episode = Episode(source="x", native_id="n", task_id="n", steps=(step,), outcome_reward=1.0, success=True)
    row, lost = adp.write(episode)
    assert row == {
        "id": "n",
        "content": [
            {"class_": "text_observation", "content": "a page", "name": None, "source": "environment"},
            {"class_": "message_action", "content": "click[4]", "description": None},
        ],
        "details": {},
    }
    (content, _) = row["content"]
    assert adp.write(replace(episode, goal="Buy"))[0]["content"] == [text("Buy"), content, row["content"][1]]
    assert lost == ["outcome_reward", "success", *(f"steps.{f}" for f in ("action_grammar", "reward", "terminated"))]


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
maybe = st.none() | words
actions = st.one_of(
    st.builds(api, words, maybe, a=words | st.integers(0, 9) | st.sampled_from(['"1"', '"\\"2\\""'])),
    st.builds(code, words, words),
    st.builds(message, words, maybe),
)
observations = st.one_of(
    st.builds(text, words, st.sampled_from(["user", "environment"])),
    st.builds(page, axtree=words, url=maybe),
    st.builds(page, html=words.map("<p>{}</p>".format), viewport_size=st.just([3, 4])),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.lists(observations, max_size=2), actions), min_size=1, max_size=4))
def test_reading_what_was_written(tmp_path, turns):
    episode = one(tmp_path, *(item for seen, did in turns for item in (*seen, did)))
    row, lost = adp.write(episode)
    assert lost == []
    (again,) = read(tmp_path, row)
    assert again.steps == episode.steps


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.binary(max_size=6))
def test_any_bytes(tmp_path, at, noise):
    row = {"id": "a", "content": [text("x"), page(html=TREE, image_observation=image("b")), api("f", a='"1"')]}
    data = json.dumps([row]).encode()
    path = tmp_path / "sample_std.json"
    path.write_bytes(data[:at] + noise + data[at + len(noise) :])
    adp.detect(Sample(path))
    for found in logs.read("adp", path):
        assert isinstance(found, Rejected) or convert(without_pictures(found), "i")
