"""Outcomes without steps: each is quarantined, with the outcome in the message."""

import json
from collections import Counter
from typing import Any

import pytest

from offline_lm import logs
from offline_lm.logs._adapters import Sample

ENVS = [
    {"name": "env_0", "memory": ["I failed."], "is_success": False},
    {"name": "env_1", "memory": [], "is_success": True},
]


def read(path) -> list[Any]:
    return list(logs.read("reflexion", path))


def write(tmp_path, value, trial=2):
    (tmp_path / f"env_results_trial_{trial}.json").write_text(json.dumps(value))
    return [(r.reason, r.message.partition(";")[0]) for r in read(tmp_path)]


@pytest.mark.parametrize("value", [ENVS, {env["name"]: env for env in ENVS}])
def test_each_environment_is_refused_with_its_outcome(tmp_path, value):
    assert write(tmp_path, value) == [
        ("outcome_only", "env_0: not solved, 1 reflections, no step was logged"),
        ("outcome_only", "env_1: solved by trial 2, in it or in an earlier one, 0 reflections, no step was logged"),
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([{"name": "a"}], "missing_key"),
        ([{"is_success": 1}], "wrong_type"),
        ({"a": 3}, "missing_key"),
        ({"a": {"is_success": "yes"}}, "wrong_type"),
        ([], "empty_file"),
    ],
)
def test_what_else_is_rejected(tmp_path, value, reason):
    assert [got for got, _ in write(tmp_path, value)] == [reason]


def test_detect(tmp_path):
    write(tmp_path, ENVS)
    (tmp_path / "x.json").write_text('{"is_success": true}')
    detect = logs.format_of("reflexion").detect
    assert detect(Sample(tmp_path / "env_results_trial_2.json"))
    assert detect(Sample(tmp_path / "x.json")) is None


def test_the_real_trials(shared_data):
    records = read(shared_data / "reflexion-webshop")
    assert Counter(r.reason for r in records) == {"outcome_only": 500}
    assert sum(": solved by trial" in r.message for r in records) == 168
    assert len({(r.uri, r.offset) for r in records}) == 500
