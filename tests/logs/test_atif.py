"""ATIF trajectories and Harbor's trial folders, as its RFC 0001 and writers have them (no real sample is at hand)."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offline_lm import logs
from offline_lm.errors import UserError
from offline_lm.logs import atif
from offline_lm.logs._adapters import Sample
from offline_lm.store.rows import convert
from offline_lm.types import Episode, Rejected

AGENT = {"name": "terminus-2", "version": "2.0", "model_name": "openai/gpt-x"}


def user(message, **more):
    return {"source": "user", "message": message} | more


def agent(message, *calls, results=(), **more):
    step: dict[str, Any] = {"source": "agent", "message": message}
    if calls:
        step["tool_calls"] = [
            {"tool_call_id": f"c{i}", "function_name": name, "arguments": args} for i, (name, args) in enumerate(calls)
        ]
    if results:
        step["observation"] = {"results": [{"source_call_id": f"c{i}", "content": r} for i, r in enumerate(results)]}
    return step | more


RUN = agent("Let me look.", ("bash", {"cmd": "ls"}), results=["a.txt"], reasoning_content="look first")
STEPS = [user("Make b.txt."), RUN, agent("Done.")]


def document(steps, version="ATIF-v1.8", **more):
    numbered = [{"step_id": i + 1} | step for i, step in enumerate(steps)]
    return {"schema_version": version, "session_id": "s1", "agent": AGENT, "steps": numbered} | more


def trial(tmp_path, made, *, reward=None, rewards=None, result=None, name="t__1", **files):
    folder = tmp_path / "job" / name
    for part in ("agent", "verifier"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "agent" / "trajectory.json").write_text(json.dumps(made))
    for file, value in files.items():
        (folder / "agent" / file.replace("__", ".")).write_text(json.dumps(value))
    if reward is not None:
        (folder / "verifier" / "reward.txt").write_text(reward)
    if rewards is not None:
        (folder / "verifier" / "reward.json").write_text(json.dumps(rewards))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def without_pictures(episode: Episode) -> Episode:
    """As the store has it once it has put the pictures away."""
    kept = ("sha256", "mime", "status")
    shots = [{k: s.screenshot[k] for k in kept} if s.screenshot else None for s in episode.steps]
    return replace(episode, steps=tuple(replace(s, screenshot=x) for s, x in zip(episode.steps, shots, strict=True)))


def one(path) -> Episode:
    (episode,) = logs.read("atif", path)
    assert isinstance(episode, Episode), episode
    convert(without_pictures(episode), "i")
    return episode


def steps_of(tmp_path, steps, **more):
    return one(trial(tmp_path, document(steps, **more))).steps


def test_a_trial(tmp_path):
    result = {
        "task_name": "hello-world",
        "trial_name": "t__1",
        "source": "terminal-bench",
        "started_at": "2025-11-01T10:00:00Z",
        "finished_at": "2025-11-01T10:01:30Z",
        "verifier_result": {"rewards": {"reward": 1.0}},
        "exception_info": None,
    }
    total = {"total_prompt_tokens": 120, "total_completion_tokens": 18, "total_cost_usd": 0.5}
    got = one(trial(tmp_path, document(STEPS, final_metrics=total), reward="1.0\n", result=result))
    assert (got.native_id, got.dataset, got.task_id, got.benchmark) == ("t__1", "job", "hello-world", "terminal-bench")
    assert (got.goal, got.agent, got.model) == ("Make b.txt.", "terminus-2", "openai/gpt-x")
    assert (got.outcome_reward, got.success, got.duration_s) == (1.0, True, 90.0)
    assert (got.terminated, got.truncated, got.end_reason) == (True, None, "agent_stop")
    assert (got.tokens_in, got.tokens_out, got.cost_usd) == (120, 18, 0.5)
    assert got.quality_flags == ()
    assert [(label.kind, label.name, label.value) for label in got.labels] == [("env", "reward", 1.0)]
    first, second = got.steps
    assert json.loads(first.messages or "") == [{"role": "user", "content": "Make b.txt."}]
    assert (first.action, first.action_name, first.action_args) == ('bash(cmd="ls")', "bash", {"cmd": "ls"})
    assert (first.thought or "").startswith("look first")
    assert (first.reward, first.terminated) == (0.0, None)
    assert "Let me look." in (first.response or "")
    assert json.loads(second.messages or "") == [{"role": "tool", "tool_call_id": "c0", "content": "a.txt"}]
    assert (second.action, second.reward, second.reward_source, second.terminated) == ("Done.", 1.0, "outcome", True)


def test_exact_tokens(tmp_path):
    metrics = {
        "prompt_token_ids": [1, 2, 3],
        "completion_token_ids": [4, 5],
        "logprobs": [-0.5, -0.25],
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "cost_usd": 0.125,
    }
    got = one(trial(tmp_path, document([user("x"), agent("y", metrics=metrics, timestamp="2025-11-01T10:00:00Z")])))
    (step,) = got.steps
    assert (step.prompt_token_ids, step.response_token_ids) == ((1, 2, 3), (4, 5))
    assert (step.response_logprobs, step.behavior_logprob) == ((-0.5, -0.25), -0.75)
    assert step.extra == {"metrics": {"prompt_tokens": 3, "completion_tokens": 2, "cost_usd": 0.125}}
    assert (got.tokens_in, got.tokens_out, got.cost_usd) == (3, 2, 0.125)
    assert step.ts_start is not None
    assert step.ts_start.isoformat() == "2025-11-01T10:00:00+00:00"


def test_copied_context_is_seen_and_is_no_step(tmp_path):
    copied = [user("old", is_copied_context=True), agent("older answer", is_copied_context=True)]
    got = one(trial(tmp_path, document([*copied, user("new"), agent("z")])))
    (step,) = got.steps
    said = [(m["role"], m["content"]) for m in json.loads(step.messages or "")]
    assert said == [("user", "old"), ("assistant", "older answer"), ("user", "new")]
    assert (step.action, got.goal) == ("z", "new")
    plain = steps_of(tmp_path, [user("new"), agent("z")])[0]
    assert step.context_hash != plain.context_hash


def test_nothing_but_copied_context(tmp_path):
    path = trial(tmp_path, document([agent("old", is_copied_context=True)]))
    (got,) = logs.read("atif", path)
    assert isinstance(got, Rejected)
    assert got.reason == "no_steps"


def test_continuation_is_one_episode(tmp_path):
    first = document([user("go"), RUN], continued_trajectory_ref="trajectory.cont-1.json")
    rest = document([user("so far: ls", is_copied_context=True), agent("Done.")])
    got = one(trial(tmp_path, first, reward="0", **{"trajectory.cont-1.json": rest}))
    assert [step.action for step in got.steps] == ['bash(cmd="ls")', "Done."]
    assert [step.reward for step in got.steps] == [0.0, 0.0]
    assert got.success is False
    assert got.steps[1].extra == {"context_reset": True}
    assert json.loads(got.steps[1].messages or "") == [{"role": "user", "content": "so far: ls"}]


def test_subagents_are_episodes(tmp_path):
    child = {
        "trajectory_id": "sub",
        "agent": {"name": "helper", "version": "1"},
        "steps": [{"step_id": 1} | agent("hi")],
    }
    call = agent("ask", ("task", {}))
    call["observation"] = {"results": [{"subagent_trajectory_ref": [{"trajectory_id": "sub"}]}]}
    path = trial(tmp_path, document([user("x"), call], subagent_trajectories=[child]), reward="1")
    parent, sub = logs.read("atif", path)
    assert isinstance(parent, Episode)
    assert isinstance(sub, Episode)
    assert parent.steps[0].extra is not None
    assert parent.steps[0].extra["subagents"] == [{"trajectory_id": "sub"}]
    assert (sub.native_id, sub.agent, sub.extra["parent"]) == ("t__1/sub", "helper", "t__1")
    assert (parent.outcome_reward, sub.outcome_reward, sub.quality_flags) == (1.0, None, ("unlabelled",))
    convert(sub, "i")


@pytest.mark.parametrize(
    ("given", "reward", "success", "flags"),
    [
        ({"reward": "0.4"}, 0.4, None, ()),
        ({"reward": "0"}, 0.0, False, ()),
        ({"rewards": {"reward": 1, "speed": 0.3}}, 1.0, True, ()),
        ({"rewards": {"score": 0.5}}, 0.5, None, ()),
        ({"rewards": {"a": 1, "b": 0}}, None, None, ("several_rewards", "unlabelled")),
        ({"reward": "pass"}, None, None, ("reward_unreadable", "unlabelled")),
        ({"reward": "nan"}, None, None, ("reward_unreadable", "unlabelled")),
        ({"reward": ""}, None, None, ("reward_unreadable", "unlabelled")),
        ({"rewards": {}}, None, None, ("reward_unreadable", "unlabelled")),
        ({"rewards": []}, None, None, ("reward_unreadable", "unlabelled")),
        ({"result": {"verifier_result": {"rewards": {"reward": 1.0}}}}, 1.0, True, ()),
        ({"reward": "0", "result": {"verifier_result": {"rewards": {"reward": 1}}}}, 0.0, False, ("reward_conflict",)),
        ({"result": []}, None, None, ("result_unreadable", "unlabelled")),
        ({}, None, None, ("unlabelled",)),
    ],
)
def test_rewards(tmp_path, given, reward, success, flags):
    got = one(trial(tmp_path, document(STEPS), **given))
    assert (got.outcome_reward, got.success, got.quality_flags) == (reward, success, flags)
    assert got.steps[-1].reward == reward


@pytest.mark.parametrize(
    ("exception", "end"),
    [
        ("AgentTimeoutError", (False, True, "time_limit")),
        ("RuntimeError", (None, None, "agent_error")),
        ("VerifierTimeoutError", (True, None, "agent_stop")),
    ],
)
def test_ends(tmp_path, exception, end):
    result = {"exception_info": {"exception_type": exception, "exception_message": "m", "exception_traceback": "t"}}
    got = one(trial(tmp_path, document(STEPS), reward="0", result=result))
    assert (got.terminated, got.truncated, got.end_reason) == end
    assert (got.steps[-1].terminated, got.steps[-1].truncated) == end[:2]
    assert got.extra["exception"] == {"exception_type": exception, "exception_message": "m"}


@pytest.mark.parametrize("minor", [*range(9), 12])
def test_versions(tmp_path, minor):
    got = one(trial(tmp_path, document(STEPS, f"ATIF-v1.{minor}")))
    assert ("newer_version" in got.quality_flags) == (minor > 8)
    assert len(got.steps) == 2


def test_pictures_stay_in_their_folder(tmp_path):
    def shown(path):
        return [{"type": "text", "text": "see"}, {"type": "image", "source": {"media_type": "image/png", "path": path}}]

    paths = ("images/a.png", "../../../secret.png", "/etc/hostname", "https://a/b.png", "x" * 300, "", "a\0")
    steps = [step for path in paths for step in (user(shown(path)), agent("ok"))]
    folder = trial(tmp_path, document(steps))
    png = b"\x89PNG\r\n\x1a\n"
    (folder / "agent" / "images").mkdir()
    (folder / "agent" / "images" / "a.png").write_bytes(png)
    (tmp_path / "secret.png").write_bytes(png)
    made = one(folder).steps
    assert [s.screenshot and s.screenshot["status"] for s in made] == ["ok", *["missing"] * 6]
    assert json.loads(made[1].messages or "")[0]["content"] == "see\n[image missing]"


def test_final_observation_and_scripted_steps(tmp_path):
    scripted = agent("", ("submit", {}), results=["bye"], llm_call_count=0)
    got = one(trial(tmp_path, document([user("x"), scripted])))
    assert got.quality_flags == ("scripted_steps", "unlabelled")
    assert got.steps[-1].is_final_observation
    assert json.loads(got.steps[-1].messages or "")[0]["content"] == "bye"


def test_lone_files_folders_and_detection(tmp_path):
    folder = trial(tmp_path, document(STEPS), reward="1")
    trial(tmp_path, document(STEPS), reward="0", name="t__2")
    trial(tmp_path, document(STEPS), name="t__3/steps/one")
    assert [e.native_id for e in logs.read("atif", tmp_path) if isinstance(e, Episode)] == ["t__1", "t__2", "t__3/one"]
    alone = tmp_path / "alone" / "trajectory-abc.json"
    alone.parent.mkdir()
    alone.write_text(json.dumps(document(STEPS)))
    got = one(alone)
    assert (got.native_id, got.dataset, got.outcome_reward) == ("trajectory-abc", "alone", None)
    assert atif.detect(Sample(alone)) == "schema_version ATIF-v1.8"
    assert atif.detect(Sample(folder)) == "a Harbor trial"
    assert len([e for e in logs.read("auto", folder) if isinstance(e, Episode)]) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no Harbor trial"):
        list(logs.read("atif", empty))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ([], "not_an_object"),
        ({}, "missing_key"),
        (document(STEPS, "ATIF-v2.0"), "unsupported_version"),
        (document(STEPS, "1"), "unsupported_version"),
        (document([]), "no_steps"),
        (document([user("x")]), "no_steps"),
        (document([agent("x", metrics={"completion_token_ids": [1], "logprobs": [-1, -2]})]), "length_mismatch"),
        (document([agent("x", metrics={"completion_token_ids": [-1]})]), "out_of_range"),
        (document([agent("x", metrics={"prompt_token_ids": [2**40]})]), "out_of_range"),
        (document([agent("x", metrics={"logprobs": [0.5]})]), "out_of_range"),
        (document([agent("x", timestamp="noon")]), "bad_time"),
        (document([agent("x", source="robot")]), "bad_value"),
        (document([agent("x"), agent("y", step_id=5)]), "missing_steps"),
        (document([agent("x"), agent("y", step_id=1)]), "missing_steps"),
        (document([agent("x", tool_calls=[{"arguments": {}}])]), "missing_key"),
        (document([agent("x", observation={"results": [3]})]), "wrong_type"),
        (document([agent("x")], agent="me"), "wrong_type"),
        (document([{"source": 4}]), "wrong_type"),
    ],
)
def test_rejected(tmp_path, made, reason):
    (got,) = logs.read("atif", trial(tmp_path, made))
    assert isinstance(got, Rejected)
    assert got.reason == reason
    assert got.uri.endswith("trajectory.json")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 900), st.binary(max_size=5), st.sampled_from(["trajectory", "result", "reward"]))
def test_any_bytes(tmp_path, at, noise, which):
    metrics = {"completion_token_ids": [1], "logprobs": [-1.0]}
    made = document(
        [user("x"), RUN | {"metrics": metrics}], continued_trajectory_ref="x.json", subagent_trajectories=[]
    )
    result = {"exception_info": {"exception_type": "X"}, "started_at": "2025-11-01T10:00:00Z"}
    folder = trial(tmp_path, made, rewards={"reward": 1}, result=result)
    file = {"trajectory": "agent/trajectory.json", "result": "result.json", "reward": "verifier/reward.json"}[which]
    data = (folder / file).read_bytes()
    at %= len(data)
    (folder / file).write_bytes(data[:at] + noise + data[at + len(noise) :])
    atif.detect(Sample(folder / file))
    for found in logs.read("atif", folder):
        assert isinstance(found, Rejected) or convert(found, "i")
