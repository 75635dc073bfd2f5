"""source=chat: each preset, the user's own field map, Parquet and its bombs, tokens, and rows written and read back."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs import _files, _parquet, chat
from offline_lm.logs._adapters import Sample
from offline_lm.store import rows
from offline_lm.types import Candidate, Episode, Label, Rejected, Step

USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "yes"}
TALK = [USER, SAID, USER, SAID]


def save(folder: Path, *lines: Any, name: str = "log.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"".join((x if isinstance(x, bytes) else orjson.dumps(x)) + b"\n" for x in lines))
    return path


def every(path: Path, **options: Any) -> list[Episode | Rejected]:
    return list(logs.read("chat", path, **options))


def episode(folder: Path, *lines: Any, **options: Any) -> Episode:
    (record,) = every(save(folder, *lines), **options)
    assert isinstance(record, Episode), record
    rows.convert(record, "i")
    return record


def refused(folder: Path, line: Any, **options: Any) -> str:
    (record,) = every(save(folder, line), **options)
    assert isinstance(record, Rejected), record
    return record.reason


def acting(record: Episode) -> list[Step]:
    return [step for step in record.steps if not step.is_final_observation]


def saw(step: Step) -> list[dict[str, Any]]:
    return orjson.loads(step.messages or "")


# --- presets ------------------------------------------------------------------------------------------------


def test_openai_row(tmp_path):
    row = {"id": "e1", "messages": [*TALK, USER], "task_id": 7, "trial": 2, "model": "m", "reward": 1, "tools": ["t"]}
    record = episode(tmp_path, row | {"terminated": True, "seed_note": None})
    assert (record.native_id, record.dataset, record.task_id, record.trial, record.model) == ("e1", "log", "7", 2, "m")
    assert [step.reward for step in record.steps] == [0.0, 1.0, None]
    assert (record.outcome_reward, record.success, record.terminated, record.truncated) == (1.0, None, True, None)
    assert (record.steps[1].terminated, record.steps[2].is_final_observation) == (True, True)
    assert record.extra == {"tools": ["t"]}
    assert record.quality_flags == ()


def test_a_line_may_be_the_messages_alone(tmp_path):
    record = episode(tmp_path, TALK)
    assert (len(record.steps), record.quality_flags, record.outcome_reward) == (2, ("unlabelled",), None)
    assert record.native_id == (record.sha256 or "")[:32]
    assert [step.reward for step in record.steps] == [None, None]


def test_the_id_is_the_model_task_and_trial_where_there_is_a_trial(tmp_path):
    row = {"messages": TALK, "task_id": "shop/1"}
    assert len(episode(tmp_path, row).native_id) == 32
    assert episode(tmp_path, row | {"trial": "3", "model": "m"}).native_id == "m/shop/1/3"


def test_success_alone_is_the_outcome(tmp_path):
    record = episode(tmp_path, {"messages": TALK, "success": False})
    assert (record.outcome_reward, record.success) == (0.0, False)
    assert [step.reward_source for step in record.steps] == ["outcome", "outcome"]


def test_rewards_of_steps(tmp_path):
    record = episode(tmp_path, {"messages": TALK, "rewards": [0.5, 1]})
    assert [(step.reward, step.reward_source) for step in record.steps] == [(0.5, "env"), (1.0, "env")]
    assert record.outcome_reward == 1.5
    assert episode(tmp_path, {"messages": TALK, "rewards": [None, 1]}).outcome_reward is None


def test_openai_weight_zero_is_context(tmp_path):
    record = episode(tmp_path, {"messages": [USER, SAID | {"weight": 0}, USER, SAID | {"weight": 1}]})
    assert len(record.steps) == 1
    assert saw(record.steps[0]) == [USER, SAID, USER]


def test_trl_prompt_is_context(tmp_path):
    for prompt, completion in (([USER, SAID, USER], [SAID]), ([USER, SAID, USER], SAID), ("hi", "yes")):
        record = episode(tmp_path, {"prompt": prompt, "completion": completion, "reward": 0.5})
        assert [(step.response, step.reward) for step in record.steps] == [("yes", 0.5)]
        assert len(saw(record.steps[0])) == (1 if prompt == "hi" else 3)


def test_verl_dump(tmp_path):
    row = {"input": "system\nS\nuser\nU\nassistant\n", "output": "<think>x</think>A", "gts": "g", "score": -1.0}
    record = episode(tmp_path, row | {"step": 40, "acc": 0})
    assert (record.dataset, record.policy_id, record.outcome_reward) == (tmp_path.name, "step-40", -1.0)
    assert (record.steps[0].response, record.steps[0].action) == ("<think>x</think>A", "A")
    assert record.extra == {"gts": "g", "acc": 0}
    assert record.steps[0].response_token_ids is None


def test_verl_dump_with_the_markers_of_the_template_has_every_turn(tmp_path):
    asked = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    answered = "one<|im_end|>\n<|im_start|>user\ntool says<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"
    record = episode(tmp_path, {"input": asked, "output": answered, "gts": None, "score": 1, "step": 1})
    assert [step.response for step in record.steps] == ["one", "two"]
    assert [step.reward for step in record.steps] == [0.0, 1.0]


TOKENS = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "completion_mask": [1, 1], "completion_logprobs": [-0.5, 0.0]}
ROLLOUT = {
    "example_id": 3,
    "prompt": [USER],
    "completion": [SAID, USER, SAID],
    "reward": 0.5,
    "metrics": {"format": 1.0},
    "is_completed": True,
    "is_truncated": False,
    "stop_condition": "no_tools_called",
}


def test_verifiers_tokens_go_to_their_step(tmp_path):
    second = {"tokens": TOKENS | {"prompt_ids": [1, 2, 3, 4, 5], "completion_mask": [1, 0]}, "reward": 0.5}
    record = episode(tmp_path, ROLLOUT | {"trajectory": [{"tokens": TOKENS, "reward": 0.5}, second]})
    first, last = record.steps
    assert (first.prompt_token_ids, first.response_token_ids) == ((1, 2), (3, 4))
    assert first.response_logprobs == (-0.5, 0.0)
    assert (last.prompt_token_ids, last.response_token_ids) == ((1, 2, 3, 4, 5), (3,))
    assert last.response_logprobs == (-0.5,)
    assert [step.reward for step in record.steps] == [0.0, 0.5]  # never the total on each step
    assert (record.task_id, record.outcome_reward, record.terminated, record.truncated) == ("3", 0.5, True, False)
    assert "trajectory" not in record.extra


def test_tokens_of_a_whole_rollout_are_divided_by_the_mask(tmp_path):
    tokens = {"prompt_ids": [1], "completion_ids": [2, 3, 9, 4], "completion_mask": [1, 1, 0, 1]}
    record = episode(tmp_path, ROLLOUT | tokens | {"completion_logprobs": [-1, -2, 0, -3]})
    assert [step.prompt_token_ids for step in record.steps] == [(1,), (1, 2, 3, 9)]
    assert [step.response_token_ids for step in record.steps] == [(2, 3), (4,)]
    assert [step.response_logprobs for step in record.steps] == [(-1.0, -2.0), (-3.0,)]


def test_tokens_that_fit_no_step_stay_in_extra(tmp_path):
    record = episode(tmp_path, ROLLOUT | {"trajectory": [{"tokens": TOKENS}]})
    assert record.quality_flags == ("tokens_unmatched",)
    assert record.extra["trajectory"] == [{"tokens": TOKENS}]
    assert record.steps[0].response_token_ids is None


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ({"completion_ids": [1]}, "length_mismatch"),
        ({"completion_mask": [1]}, "length_mismatch"),
        ({"completion_ids": [1, -1]}, "bad_value"),
        ({"completion_ids": [1, True]}, "bad_value"),
        ({"completion_logprobs": [0.5, 0]}, "bad_value"),
        ({"completion_logprobs": [None, 0]}, "bad_value"),
        ({"completion_ids": None}, "missing_key"),
        ({"prompt_ids": "1 2"}, "wrong_type"),
    ],
)
def test_bad_tokens_are_refused(tmp_path, tokens, reason):
    bad = [{"tokens": TOKENS | tokens}, {"tokens": None}]
    assert refused(tmp_path, ROLLOUT | {"trajectory": bad}) == reason


@pytest.mark.parametrize(
    ("logged", "end"),
    [
        ({"stop_condition": "max_turns_reached"}, (False, True, "step_limit")),
        ({"is_truncated": True}, (False, True, None)),
        ({"is_completed": False}, (None, False, None)),
        ({"error": "boom"}, (None, False, None)),
        ({}, (True, False, None)),
    ],
)
def test_verifiers_ends(tmp_path, logged, end):
    record = episode(tmp_path, ROLLOUT | logged)
    assert (record.terminated, record.truncated, record.end_reason) == end
    assert (record.steps[-1].terminated, record.steps[-1].truncated) == end[:2]


def test_sharegpt(tmp_path):
    turns = [
        {"from": "human", "value": "rules", "loss": None},
        {"from": "gpt", "value": "Ok.", "loss": False},
        {"from": "human", "value": "page", "loss": None},
        {"from": "gpt", "value": "Thought:\nt\n\nAction:\nclick[Buy Now] ", "loss": True},
        {"from": "observation", "value": "bought"},
        {"from": "gpt", "value": "And?", "loss": None},
    ]
    record = episode(tmp_path, {"conversations": turns, "id": "w_1", "reward": 0.75, "source": "human"})
    step, final = record.steps
    assert (step.action, step.thought, step.reward) == ("click[Buy Now]", "t", 0.75)
    assert saw(step) == [
        {"role": "user", "content": "rules"},
        {"role": "assistant", "content": "Ok."},
        {"role": "user", "content": "page"},
    ]
    assert [m["role"] for m in saw(final)] == ["tool", "assistant"]
    assert (record.native_id, record.task_id, record.extra) == ("w_1", "w_1", {"source": "human"})


def test_sharegpt_function_calls_and_no_loss(tmp_path):
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    record = episode(tmp_path, {"conversations": [*turns, {"from": "observation", "value": "1"}]})
    assert (acting(record)[0].action, acting(record)[0].action_name) == ("f(x=1)", "f")
    assert refused(tmp_path, {"conversations": [{"from": "function_call", "value": "{"}]}) == "json_truncated"


def test_tau_bench_ends(tmp_path):
    def run(*traj):
        record = episode(tmp_path, {"task_id": 1, "trial": 0, "reward": 1.0, "info": {"task": {}}, "traj": list(traj)})
        return record.terminated, record.truncated, record.end_reason

    stop = {"role": "user", "content": "Bye ###STOP###"}
    call = {"id": "1", "type": "function", "function": {"name": "transfer_to_human_agents", "arguments": "{}"}}
    assert run(USER, SAID, stop) == (True, False, "env_done")
    assert run(USER, SAID | {"tool_calls": [call]}, {"role": "tool", "content": "ok"}) == (True, False, "env_done")
    assert run(*[USER, SAID] * 30, USER) == (False, True, "step_limit")
    assert run(*[USER, SAID] * 30, stop) == (True, False, "env_done")
    assert run(USER, SAID, USER) == (None, None, None)


LLAMA = "<|start_header_id|>{}<|end_header_id|>\n{}\n<|eot_id|>"


def nnetnav(name: str, past: str, command: str, **keys: Any) -> dict[str, Any]:
    page = f"OBSERVATION:\npage {past}\nURL: http://a.com/{past}\nOBJECTIVE: Buy it\nPREVIOUS ACTIONS:\n1: {past}"
    prompt = "<|begin_of_text|>" + LLAMA.format("system", "rules") + LLAMA.format("user", page)
    output = LLAMA.format("assistant", f"Thus, the next action I will perform is ```{command}```")
    return {"dataset": "d", "id": name, "task_name": name, "prompt": prompt, "output": output, "n_tokens": 9} | keys


def test_nnetnav_rows_of_one_episode_follow_each_other(tmp_path):
    lines = [
        nnetnav("a", "None", "click [3]"),
        nnetnav("a", "two", "stop [done]"),
        nnetnav("b", "None", "scroll [down]"),
    ]
    first, second = every(save(tmp_path, *lines))
    assert isinstance(first, Episode)
    assert isinstance(second, Episode)
    assert (first.dataset, first.native_id, first.goal, first.start_url) == ("d", "a", "Buy it", "http://a.com/None")
    assert [(s.observation, s.observation_kind, s.action) for s in first.steps] == [
        ("page None", "axtree", "click [3]"),
        ("page two", "axtree", "stop [done]"),
    ]
    assert first.steps[0].target == {"ref": "3"}
    assert first.steps[1].extra == {"previous_actions": "1: two", "n_tokens": 9}
    assert (first.terminated, first.end_reason, first.final_answer) == (True, "agent_stop", "done")
    assert (second.terminated, len(second.steps), second.extra) == (None, 1, {"system": "rules"})


def test_an_nnetnav_episode_with_a_row_that_cannot_be_read_says_so(tmp_path):
    bad = nnetnav("a", "two", "x", prompt="<|begin_of_text|>cut", output="")
    records = every(save(tmp_path, nnetnav("a", "None", "click [3]"), bad, nnetnav("a", "three", "stop [x]")))
    assert [record.reason for record in records if isinstance(record, Rejected)] == ["bad_value"]
    (kept,) = (record for record in records if isinstance(record, Episode))
    assert (len(kept.steps), kept.quality_flags) == (2, ("unlabelled", "missing_rows"))


# --- the field map ------------------------------------------------------------------------------------------


def test_a_row_with_names_of_its_own(tmp_path):
    row = {"log": {"turns": TALK}, "eval": {"scores": [0.25]}, "task": {"name": "t"}, "who": "m", "want": "buy"}
    where = {"messages": "log.turns", "reward": "eval.scores.0", "task_id": "task.name", "model": "who", "goal": "want"}
    record = episode(tmp_path, row, fields=where, dataset="mine")
    assert (record.dataset, record.outcome_reward, record.task_id, record.model) == ("mine", 0.25, "t", "m")
    assert record.goal == "buy"
    assert record.extra == {"log": row["log"], "eval": row["eval"], "task": row["task"]}


def test_a_field_can_be_taken_away(tmp_path):
    row = {"messages": TALK, "reward": {"total": 1}}
    assert refused(tmp_path, row) == "wrong_type"
    assert episode(tmp_path, row, fields={"reward": None}).quality_flags == ("unlabelled",)
    assert episode(tmp_path, row, fields={"reward": "reward.total"}).outcome_reward == 1.0


def test_a_preset_can_be_named(tmp_path):
    row = {"messages": TALK, "prompt": "p", "completion": "c"}
    assert len(episode(tmp_path, row).steps) == 2
    assert episode(tmp_path, row, preset="trl").steps[0].response == "c"


def test_mistakes_of_the_user(tmp_path):
    path = save(tmp_path, {"messages": TALK})
    with pytest.raises(UserError, match="preset=gpt is not known; take one of: auto, openai, trl"):
        every(path, preset="gpt")
    with pytest.raises(UserError, match="fields= names msgs; it may name: id,"):
        every(path, fields={"msgs": "x"})
    with pytest.raises(UserError, match="does not know color"):
        every(path, color=1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"who": 1}, "unknown_format"),
        (b"3", "not_an_object"),
        ({"messages": []}, "no_steps"),
        ({"messages": [USER]}, "no_steps"),
        ({"messages": [USER, SAID | {"weight": 0}]}, "no_steps"),
        ({"messages": [USER, 3]}, "wrong_type"),
        ({"messages": [USER, {"role": []}]}, "wrong_type"),
        ({"messages": TALK, "rewards": [1]}, "length_mismatch"),
        ({"messages": TALK, "rewards": ["a", "b"]}, "wrong_type"),
        ({"messages": TALK, "reward": "high"}, "wrong_type"),
        ({"messages": TALK, "trial": "first"}, "bad_value"),
        ({"messages": TALK, "trial": 2**63}, "out_of_range"),
        ({"messages": TALK, "metadata": {"schema": "offline_lm.chat/1", "episode": {"x": 1}}}, "unknown_key"),
        (b'{"messages": [', "json_truncated"),
        (b'{"messages": [], "messages": []}', "duplicate_key"),
    ],
)
def test_refused_rows(tmp_path, line, reason):
    assert refused(tmp_path, line) == reason


def test_messages_may_be_a_string_of_json(tmp_path):
    row = {"messages": orjson.dumps(TALK).decode()}
    assert len(episode(tmp_path, row, preset="openai").steps) == 2
    assert refused(tmp_path, {"messages": "[{"}, preset="openai") == "json_truncated"


def test_a_row_without_completion(tmp_path):
    assert refused(tmp_path, {"prompt": "p"}, preset="trl") == "missing_key"


# --- files --------------------------------------------------------------------------------------------------

ROWS = [{"messages": TALK, "reward": 1.0, "task_id": "a"}, {"messages": [USER, SAID], "reward": None, "task_id": "b"}]


def contents(records: list[Episode | Rejected]) -> list[str]:
    return [rows.convert(record, "i").content_hash for record in records if isinstance(record, Episode)]


def test_every_container_holds_the_same_episodes(tmp_path):
    lines = save(tmp_path, *ROWS)
    array = tmp_path / "array.json"
    array.write_bytes(orjson.dumps(ROWS, option=orjson.OPT_INDENT_2))
    packed = tmp_path / "log.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    table = tmp_path / "table.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), table, row_group_size=1)
    known = contents(every(lines))
    assert len(known) == 2
    assert contents(every(array)) == contents(every(packed)) == contents(every(table)) == known
    assert [record.steps[0].source_offset for record in every(table) if isinstance(record, Episode)] == [0, 1]
    assert len(every(tmp_path)) == 8
    for path in (lines, array, packed, table):
        assert chat.detect(Sample(path)), path


def test_parquet_rows_that_fail_leave_the_others(tmp_path):
    bad = {"messages": [USER, {"role": None, "content": "x"}], "reward": 1.0, "task_id": "c"}
    pq.write_table(pa.Table.from_pylist([ROWS[0], bad, ROWS[1]]), tmp_path / "t.parquet")
    first, second, third = every(tmp_path / "t.parquet")
    assert isinstance(second, Rejected)
    assert (second.reason, second.offset) == ("missing_key", 1)
    assert isinstance(first, Episode)
    assert isinstance(third, Episode)


def test_not_a_number_in_parquet_is_null(tmp_path):
    table = pa.table({"messages": [TALK], "reward": pa.array([float("nan")])})
    pq.write_table(table, tmp_path / "t.parquet")
    (record,) = every(tmp_path / "t.parquet")
    assert isinstance(record, Episode)
    assert record.outcome_reward is None


def bomb(path: Path, copies: int, length: int) -> Path:
    """One row that refers `copies` times to one string: under a kilobyte for copies * length bytes."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * copies, pa.int32()), pa.array(["x" * length]))
    role = pa.array(["user"] * copies)
    turns = pa.StructArray.from_arrays([role, text], ["role", "content"])
    messages = pa.ListArray.from_arrays(pa.array([0, copies], pa.int32()), turns)
    pq.write_table(pa.table({"messages": messages}), path, compression="zstd")
    assert path.stat().st_size < 5_000
    return path


def test_a_parquet_bomb_of_references_is_refused_unexpanded(tmp_path):
    path = bomb(tmp_path / "t.parquet", 2_000, 1_000_000)  # 2 GB
    (record,) = every(path)
    assert isinstance(record, Rejected)
    assert record.reason == "too_large"
    before = pa.default_memory_pool().max_memory()
    with path.open("rb") as stream:
        assert len(list(_parquet.read_rows(stream))) == 1
    assert pa.default_memory_pool().max_memory() - (before or 0) < 100 << 20


def test_a_row_group_too_large_by_its_footer_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)

    def refusals():
        with path.open("rb") as stream:
            return [(item[1].reason, item[0]) for item in _parquet.read_rows(stream) if type(item) is tuple]

    assert refusals() == []
    monkeypatch.setattr(_parquet, "GROUP_BYTES", 10)
    assert refusals() == [("too_large", 0), ("too_large", 1)]
    monkeypatch.setattr(_parquet, "GROUP_BYTES", _files.TOTAL_BYTES)
    monkeypatch.setattr(_parquet, "GROUP_VALUES", 3)
    assert refusals() == [("too_large", 0), ("too_large", 1)]


def test_damaged_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 200), path, compression="zstd")
    data = path.read_bytes()
    for broken in (b"", data[:-9], b"PAR1" + b"x" * 40 + b"PAR1", data[:20] + bytes(200) + data[220:]):
        path.write_bytes(broken)
        last = every(path)[-1]
        assert isinstance(last, Rejected)
        assert last.reason == "damaged_file"
        chat.detect(Sample(path))


def test_empty_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "t.parquet")
    (record,) = every(tmp_path / "t.parquet")
    assert isinstance(record, Rejected)
    assert record.reason == "empty_file"


@pytest.mark.parametrize(
    "value",
    [
        {"steps": [{"observation": "o", "action": "a"}]},
        {"history": []},
        {"states": [], "rawReward": 1, "utterance": "u"},
        {"id": "x", "content": [{"class_": "web_observation"}], "details": {}},
        {"messages": "text"},
        {"role": "user", "content": "one message of interact_messages.json"},
        {"trajectory": [], "info": {}},
        {"input": {"a": 1}, "output": {"b": 1}, "score": 1, "step": 1},
        {"task_id": 1, "trajectory": [], "intent": "i"},
        3,
    ],
)
def test_other_formats_are_not_claimed(tmp_path, value):
    assert chat.detect(Sample(save(tmp_path, value))) is None


# --- rows for others ----------------------------------------------------------------------------------------


def back(folder: Path, row: dict[str, Any]) -> Episode:
    return episode(folder, row)


def same(a: Episode, b: Episode) -> bool:
    """Whether they differ only in where they were read."""
    strip = {"uri": None, "sha256": None, "source": "chat"}
    plain = [replace(x, **strip, steps=tuple(replace(s, source_offset=None) for s in x.steps)) for x in (a, b)]
    return plain[0] == plain[1]


CALLS = [
    {"role": "system", "content": "s"},
    USER,
    {
        "role": "assistant",
        "content": "Look.",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "42"},
    {"role": "assistant", "content": "Thought: t\nAction: click[1]", "reasoning_content": "deep", "name": "n"},
    USER,
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"messages": CALLS, "reward": 1, "success": True, "goal": "g", "task_id": "t", "trial": 1, "model": "m"},
        {"messages": CALLS, "rewards": [0.5, 0], "terminated": False, "truncated": True, "tools": [{"a": 1}]},
        {"messages": CALLS, "rewards": [None, 1]},
        {"messages": [USER, SAID | {"weight": 0}, USER, SAID | {"weight": 1}], "reward": 0},
        {"prompt": [USER, SAID, USER], "completion": [SAID], "reward": 0.5},
        ROLLOUT | {"trajectory": [{"tokens": TOKENS}, {"tokens": None}]},
        {"task_id": 1, "trial": 0, "reward": 1.0, "info": {"a": {"b": 1}}, "traj": CALLS},
    ],
)
def test_a_row_written_reads_back_as_the_episode(tmp_path, row):
    given = episode(tmp_path, row)
    written, cannot = chat.write(given)
    assert cannot == []
    read_back = back(tmp_path, written)
    assert same(given, read_back)
    assert chat.write(read_back)[0] == written


def test_the_keys_of_a_row(tmp_path):
    given = episode(tmp_path, ROLLOUT | {"id": "e", "trajectory": [{"tokens": TOKENS}, {"tokens": None}]})
    row, _ = chat.write(replace(given, seed=7, labels=(Label(kind="judge", value=0.5),)))
    assert list(row) == ["messages", "id", "reward", "task_id", "terminated", "truncated", "trajectory", "metadata"]
    assert row["trajectory"][1] == {"tokens": None}
    assert row["metadata"]["episode"]["seed"] == 7
    assert row["metadata"]["schema"] == "offline_lm.chat/1"
    again = back(tmp_path, row)
    assert (again.seed, again.labels) == (7, (Label(kind="judge", value=0.5),))


def test_what_a_row_cannot_say_is_named(tmp_path):
    step = Step(
        step=0,
        observation="page",
        observation_kind="axtree",
        url="http://a.com",
        action="click('18')",
        action_grammar="browsergym",
        candidates=(Candidate(action="a"),),
        reward=1.0,
        reward_source="env",
    )
    given = Episode(source="agentlab", native_id="x", dataset="d", goal="buy", steps=(step,), outcome_reward=1.0)
    row, cannot = chat.write(given)
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("system", "Goal: buy"),
        ("user", "page"),
        ("assistant", "click('18')"),
    ]
    lost = ("url", "observation", "observation_kind", "action_grammar", "candidates")
    assert set(cannot) == {f"steps.{name}" for name in lost}
    read_back = back(tmp_path, row)
    assert (read_back.steps[0].reward, read_back.steps[0].reward_source) == (1.0, "env")
    assert (read_back.goal, read_back.native_id, read_back.dataset) == ("buy", "x", "d")


# --- real logs ----------------------------------------------------------------------------------------------


def test_real_tau_bench(shared_data):
    records = every(shared_data / "tau-bench")
    episodes = [record for record in records if isinstance(record, Episode)]
    assert (len(records), len(episodes)) == (92, 92)
    assert sum(len(acting(e)) for e in episodes) == 1067
    assert Counter(e.success for e in episodes) == {True: 41, False: 51}
    assert len({e.task_id for e in episodes}) == 23
    assert len({e.native_id for e in episodes}) == 92
    ends = Counter((e.terminated, e.truncated, e.end_reason) for e in episodes)
    assert ends == {(True, False, "env_done"): 91, (False, True, "step_limit"): 1}
    assert sum(step.action_grammar == "tool_call" for e in episodes for step in e.steps) == 513
    assert len(set(contents(records))) == 92
    for e in episodes:
        assert chat.write(e)[1] == []
    assert chat.detect(Sample(shared_data / "tau-bench" / "gpt-4o-airline_dev.json")) == "rows as tau_bench writes them"


def test_real_webshop_sharegpt(shared_data):
    """PROVENANCE: 205 episodes, 1,043 steps, 204 tasks. The folder also has 20 of them as JSONL, and webshop_2257 with
    its 4 steps stands in both Parquet files: 225 rows read, 204 different, 21 duplicates."""
    folder = shared_data / "webshop-sharegpt"
    records = every(folder)
    episodes = [e for e in records if isinstance(e, Episode)]
    assert len(records) == len(episodes) == 225
    tables = [e for e in episodes if e.dataset != "webshop_test_dev_first20"]
    assert Counter(e.dataset for e in tables) == {"webshop_test_dev": 197, "webshop_val_dev": 8}
    assert sum(len(e.steps) for e in tables) == 1043
    assert len({e.task_id for e in tables}) == 204
    assert {e.quality_flags for e in episodes} == {("unlabelled",)}
    assert Counter(step.action_name for e in tables for step in e.steps) == {"click": 838, "search": 205}
    assert len(set(contents(records))) == 204
    assert set(contents(every(folder / "webshop_test_dev_first20.jsonl"))) <= set(contents(list(tables)))
    for name in ("webshop_test_dev.parquet", "webshop_test_dev_first20.jsonl"):
        assert chat.detect(Sample(folder / name)), name


@pytest.mark.parametrize(
    ("name", "episodes", "steps", "rewards"),
    [
        ("nnetnav-wa", 3, 38, {None}),
        ("nnetnav-live", 3, 19, {None}),
        ("agenttuning_webshop", 3, 13, {None}),
        ("agenttuning_mind2web", 3, 3, {None}),
        ("eto", 3, 15, {1.0, 0.75}),
    ],
)
def test_real_rows_of_the_agent_data_protocol(shared_data, name, episodes, steps, rewards):
    """The datasets as they were before ADP made them its own; each kind of row is a preset."""
    path = shared_data / "adp" / name / "sample_raw.json"
    records = [record for record in every(path) if isinstance(record, Episode)]
    assert (len(records), sum(len(acting(record)) for record in records)) == (episodes, steps)
    assert {record.outcome_reward for record in records} == rewards
    assert len(contents(list(records))) == episodes
    assert chat.detect(Sample(path))
    if name.startswith("nnetnav"):
        assert all(record.end_reason == "agent_stop" and record.goal for record in records)
        assert all(step.action_args is not None and step.url for record in records for step in record.steps)


# --- anything else ------------------------------------------------------------------------------------------

_LEAF = st.none() | st.booleans() | st.integers(-5, 2**65) | st.floats() | st.text(max_size=5)
_KEYS = ["role", "content", "from", "value", "loss", "weight", "tool_calls", "function_call", "name", "type", "tokens"]
_ANY = st.recursive(
    _LEAF, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(_KEYS), x, max_size=4), max_leaves=12
)
_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | _ANY}, optional=dict.fromkeys(_KEYS[1:], _ANY)
)
_ROW = st.dictionaries(
    st.sampled_from(
        "messages conversations traj task_id trial reward rewards prompt completion input output score step trajectory "
        "completion_ids completion_mask metadata decisions success".split()
    ),
    _ANY | st.lists(_TURN, max_size=4) | st.lists(_TURN, min_size=1, max_size=3),
)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_ROW, st.integers(0, 300), st.binary(max_size=3))
def test_any_row_and_any_bytes_give_episodes_or_rejections(tmp_path, row, at, noise):
    data = _json(row)
    for preset in ("auto", "openai", "trl", "verifiers", "tau_bench", "sharegpt", "verl", "nnetnav"):
        for record in every(save(tmp_path, data), preset=preset):
            assert isinstance(record, Episode | Rejected)
    path = save(tmp_path, data[:at] + noise + data[at + 1 :])
    assert all(isinstance(record, Episode | Rejected) for record in every(path))
    chat.detect(Sample(path))


@pytest.fixture(scope="module")
def small_parquet(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "t.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, compression="zstd")
    return path.read_bytes()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_parquet_bytes_give_episodes_or_rejections(tmp_path, small_parquet, data):
    broken = bytearray(small_parquet)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "t.parquet"
    path.write_bytes(broken)
    assert all(isinstance(record, Episode | Rejected) for record in every(path))
    chat.detect(Sample(path))
