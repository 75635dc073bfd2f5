"""What others see of a dataset that we wrote; that we read all of it back stands in tests/test_export.py."""

import json
import math
import os
import shutil
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm.errors import UserError
from offline_lm.logs import minari as reader
from offline_lm.store import rows
from offline_lm.types import Episode, Rejected, Step

minari = pytest.importorskip("minari")
h5py = pytest.importorskip("h5py")

from gymnasium.spaces import Box, Dict, Discrete, Text  # noqa: E402
from minari.data_collector import EpisodeBuffer  # noqa: E402
from minari.dataset.minari_storage import MinariStorage  # noqa: E402

from offline_lm.interop.minari import filled, write  # noqa: E402

EPISODES = [
    Episode(
        source="jsonl",
        native_id="a",
        goal="Buy",
        seed=3,
        terminated=True,
        truncated=False,
        steps=(
            Step(step=0, observation="a page\0", action="click[1]", reward=0.0, url="u"),
            Step(step=1, messages='[{"role":"user"}]', response="done", terminated=True, truncated=False),
            Step(step=2, observation="thanks é", is_final_observation=True),
        ),
    ),
    Episode(
        source="jsonl",
        native_id="b",
        truncated=True,
        steps=(Step(step=0, observation="", action="x", reward=0.5, terminated=False, truncated=True),),
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minari") / "ours-v0"
    write(EPISODES, folder)
    return folder


def test_minari_opens_it(folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder.parent))
    data = minari.load_dataset("ours-v0")
    assert (data.total_episodes, data.total_steps) == (2, 3)
    first, second = data
    assert first.observations == ["a page\ufffd", '[{"role":"user"}]', "thanks é"]
    assert first.actions == ["click[1]", "done"]
    assert first.rewards[0] == 0
    assert math.isnan(first.rewards[1])
    assert (first.terminations.tolist(), first.truncations.tolist()) == ([False, True], [False, False])
    assert (second.terminations.tolist(), second.truncations.tolist()) == ([False], [True])
    assert second.observations == ["", ""]
    for episode in data:
        assert len(episode.observations) == len(episode.actions) + 1 == len(episode) + 1
        assert all(text in data.observation_space for text in episode.observations)
        assert all(text in data.action_space for text in episode.actions)
    assert [json.loads(text).get("url") for text in first.infos["step"]] == ["u", None, None]
    assert json.loads(first.infos["episode"][0])["goal"] == "Buy"
    assert next(iter(data.storage.get_episode_metadata([0])))["seed"] == 3


def test_stand_ins_are_named():
    assert filled(EPISODES[0]) == [
        *("steps.action", "steps.observation", "steps.reward", "steps.terminated", "steps.truncated")
    ]
    assert filled(EPISODES[1]) == ["final_observation"]


def test_read_back(folder):
    assert list(reader.read(folder)) == EPISODES


def test_a_name_that_is_no_id(tmp_path):
    write(EPISODES, tmp_path / "my logs")
    assert minari.MinariDataset(tmp_path / "my logs" / "data").id == "my-logs-v0"


def _foreign(path, observation_space, action_space, **buffer):
    (path / "data").mkdir(parents=True)
    storage = MinariStorage.new(path / "data", observation_space=observation_space, action_space=action_space)
    storage.update_metadata({"dataset_id": "their/text-v1", "minari_version": minari.__version__})
    given = {"rewards": [0, 1.5], "terminations": [False, False], "truncations": [False, True]}
    storage.update_episodes([EpisodeBuffer(**(given | buffer))])
    return path


def test_a_dataset_of_others(tmp_path):
    path = _foreign(
        tmp_path / "x",
        Text(100),
        Discrete(5),
        observations=["a", "b", "c"],
        actions=[3, 4],
        infos={"depth": [1, 2, 3], "odd": [1]},
        seed=7,
    )
    (episode,) = reader.read(path)
    assert isinstance(episode, Episode)
    assert (episode.source, episode.native_id, episode.dataset) == ("minari", "episode_0", "their/text-v1")
    assert (episode.outcome_reward, episode.terminated, episode.truncated, episode.seed) == (1.5, False, True, 7)
    assert [(s.observation, s.action, s.reward, s.truncated, s.extra) for s in episode.steps] == [
        ("a", "3", 0.0, False, {"depth": 1}),
        ("b", "4", 1.5, True, {"depth": 2}),
        ("c", None, None, None, {"depth": 3}),
    ]
    assert episode.steps[2].is_final_observation
    assert rows.convert(episode, "i").n_steps == 2


def test_spaces_of_several_parts(tmp_path):
    space = Dict({"page": Text(9), "xy": Box(0, 1, (2,))})
    path = _foreign(
        tmp_path / "x",
        space,
        Text(9),
        observations={"page": ["p", "q", "r"], "xy": np.array([[0.0, 1.0]] * 3)},
        actions=["go", "stop"],
        rewards=[math.nan, math.nan],
    )
    (episode,) = reader.read(path)
    assert isinstance(episode, Episode)
    assert json.loads(episode.steps[1].observation or "") == {"page": "q", "xy": [0.0, 1.0]}
    assert (episode.steps[0].reward, episode.outcome_reward, episode.quality_flags) == (None, None, ("unlabelled",))


def test_pictures_are_refused(tmp_path):
    picture = [np.zeros((32, 32, 3), np.uint8)] * 3
    path = _foreign(
        tmp_path / "x", Box(0, 255, (32, 32, 3), np.uint8), Text(9), observations=picture, actions=["a"] * 2
    )
    (rejected,) = reader.read(path)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "unsupported_space"


def _copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def _only(path) -> list[str]:
    return [item.reason for item in reader.read(path) if isinstance(item, Rejected)]


def test_links_are_not_followed(folder, tmp_path):
    copy = _copy(folder, tmp_path)
    file = copy / "data" / "main_data.hdf5"
    with h5py.File(file, "a") as data:
        del data["episode_0/actions"], data["episode_1/rewards"]
        data["episode_0/actions"] = h5py.ExternalLink(str(folder / "data" / "main_data.hdf5"), "/episode_0/actions")
        layout = h5py.VirtualLayout((1,), "f8")
        layout[:] = h5py.VirtualSource(str(folder / "data" / "main_data.hdf5"), "/episode_1/rewards", (1,))
        data["episode_1"].create_virtual_dataset("rewards", layout)
        data["episode_2"] = h5py.SoftLink("/episode_1")
    assert _only(copy) == ["outside_file"] * 3


def test_damage(folder, tmp_path):
    copy = _copy(folder, tmp_path)
    file, metadata = copy / "data" / "main_data.hdf5", copy / "data" / "metadata.json"
    with h5py.File(file, "a") as data:
        del data["episode_0/actions"]
        data["episode_1/truncations"].resize((0,))
    assert _only(copy) == ["missing_key", "length_mismatch"]
    whole = file.read_bytes()
    for cut in (0, 100, len(whole) // 2):
        file.write_bytes(whole[:cut])
        assert _only(copy) == ["damaged_file"]
    metadata.write_text('{"data_format": "arrow"}')
    assert _only(copy) == ["unsupported_format"]
    metadata.write_text("[]")
    assert _only(copy) == ["wrong_type"]
    os.remove(metadata)
    assert _only(copy) == ["missing_key"]
    os.remove(file)
    with pytest.raises(UserError, match="holds no Minari dataset"):
        list(reader.read(copy))


def test_text_that_is_enormous(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "TOTAL_BYTES", 10)
    with (folder / "data" / "main_data.hdf5").open("rb") as stream:
        items: list[Any] = list(reader.read_groups(stream))
    assert [(number, bad.reason) for number, bad in items] == [(0, "too_large"), (1, "too_large")]


# Few: each starts a process.
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_garbage(folder, tmp_path, data):
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(folder, copy)
    name = data.draw(st.sampled_from(["main_data.hdf5", "metadata.json"]))
    whole = bytearray((folder / "data" / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 20))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        (copy / "data" / name).write_bytes(whole)
        assert all(isinstance(item, Episode | Rejected) for item in reader.read(copy))
    finally:
        shutil.copy(folder / "data" / name, copy / "data" / name)
