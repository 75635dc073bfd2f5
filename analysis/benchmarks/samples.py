"""A small valid log of every format, as its writer makes it: what `fuzz.py` damages."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from offline_lm.interop import hf_datasets, minari
from offline_lm.types import Episode, Step


def same(data: bytes) -> bytes:
    return data


@dataclass(frozen=True)
class File:
    name: str
    data: bytes
    pack: Callable[[bytes], bytes] = same
    """how the data lie in the file, e.g. gzip: both sides of it are damaged"""


@dataclass(frozen=True)
class Sample:
    source: str
    files: tuple[File, ...]
    options: tuple[tuple[str, Any], ...] = ()
    weight: float = 1.0


def of_json(name: str, *values: Any, pack: Callable[[bytes], bytes] = same) -> File:
    return File(name, "\n".join(json.dumps(value) for value in values).encode(), pack)


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trace.trace", data)
    return sink.getvalue()


# fmt: off
TALK: list[Any] = [
    {"role": "system", "content": "You shop."},
    {"role": "user", "content": [
        {"type": "text", "text": "Buy a mug"}, {"type": "image_url", "image_url": {"url": "x"}}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "search", "arguments": '{"q": "mug"}'}}]},
    {"role": "tool", "tool_call_id": "c", "content": "3 mugs"},
    {"role": "assistant", "content": "Thought: it is red\nAction: click[4]", "reasoning_content": "hm"},
]
EPISODE = {
    "task_id": "t", "goal": "Buy", "success": True, "max_steps": 9, "labels": [{"kind": "judge", "value": 0.5}],
    "started_at": "2026-11-21T09:30:00Z", "sampling": {"temperature": 0.5, "seed": 3}, "final_observation": "end",
    "steps": [
        {"step": 0, "observation": "page", "action": "click[4]", "reward": 0, "candidates": [{"action": "a"}, "b"],
         "response_token_ids": [1, 2], "response_logprobs": [-1, -2.5], "target": {"ref": 4}, "action_args": {"x": 1}},
        {"step": 1, "messages": TALK[:2], "response": "done", "reward": 1.0, "screenshot": {"status": "missing"}},
    ],
}


def _chat() -> list[Sample]:
    prompt, completion = TALK[:2], TALK[2:]
    rows = {
        "openai": {"id": "1", "messages": TALK, "reward": 0.5, "task_id": "t", "trial": 1},
        "trl": {"prompt": "Buy", "completion": "ok", "reward": 1.0},
        "verl": {"input": "<|im_start|>user\nBuy<|im_end|>\n<|im_start|>assistant\n", "output": "ok", "gts": "x",
                 "score": 1.0, "step": 3},
        "verifiers": {"prompt": prompt, "completion": completion, "reward": 1.0, "is_completed": True,
                      "is_truncated": False, "metrics": {"a": 1.0}, "stop_condition": "done", "example_id": 1,
                      "trajectory": [{"prompt": prompt, "completion": completion, "reward": 1.0, "tokens": {
                          "prompt_ids": [1], "completion_ids": [2, 3], "completion_mask": [1, 1],
                          "completion_logprobs": [-1.0, -2.0]}}]},
        "tau": {"task_id": 1, "trial": 0, "reward": 1.0, "info": {"task": {"user_id": "a"}}, "traj": TALK},
        "sharegpt": {"id": "a", "conversations": [
            {"from": "human", "value": "Go", "loss": None}, {"from": "gpt", "value": "Ok.", "loss": False},
            {"from": "human", "value": "Page"},
            {"from": "gpt", "value": "Thought: x\nAction: click[1]", "loss": True}]},
    }
    sink = pa.BufferOutputStream()
    plain = [m for m in TALK if isinstance(m["content"], str)]
    pq.write_table(pa.Table.from_pylist([{"id": str(i), "messages": plain, "reward": 1.0} for i in range(5)]), sink)
    table = File("a.parquet", sink.getvalue().to_pybytes())
    texts = [Sample("chat", (of_json(f"{name}.jsonl", row, row),), weight=0.4) for name, row in rows.items()]
    return [*texts, Sample("chat", (table,), weight=0.03)]  # a process for each


def _agentlab() -> Sample:
    module = types.ModuleType("browsergym.experiments.loop")
    names = ("browsergym", "browsergym.experiments", module.__name__)
    kept = {name: sys.modules.get(name) for name in names}
    # pickle looks the classes up there
    sys.modules.update({name: types.ModuleType(name) for name in names} | {module.__name__: module})
    for name in ("StepInfo", "ExpArgs"):
        setattr(module, name, type(name, (), {"__module__": module.__name__}))

    def pickled(name: str, **fields: Any) -> bytes:
        value = getattr(module, name)()
        value.__dict__.update(fields)
        return pickle.dumps(value)

    def step(number: int, action: str | None, **fields: Any) -> bytes:
        obs = {"goal": "Tick", "axtree_txt": "[18] button 'One'", "url": "http://x/", "last_action_error": ""}
        told = {"think": "hm", "chat_messages": [{"role": "user", "content": "Page"}]} if action else {}
        return pickled("StepInfo", **{
            "step": number, "obs": obs, "reward": 0.0, "raw_reward": None, "terminated": False, "truncated": False,
            "action": action, "agent_info": told, "stats": {"input_tokens": 10}, "task_info": None} | fields)

    args = pickled("ExpArgs", agent_args={"agent_name": "A"}, env_args={"task_name": "miniwob.x", "task_seed": 7})
    summary = {"n_steps": 1, "cum_reward": 1.0, "err_msg": None, "terminated": True, "truncated": False}
    folder = "study/2025-01-22_11-03-29_Agent-x_on_miniwob.click-test_7/"
    files = (
        File(folder + "step_0.pkl.gz", step(0, "click('18')"), gzip.compress),
        File(folder + "step_1.pkl.gz", step(1, None, reward=1.0, terminated=True, stats=None), gzip.compress),
        File(folder + "exp_args.pkl", args),
        of_json(folder + "summary_info.json", summary),
    )
    for name, before in kept.items():
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
    return Sample("agentlab", files, (("allow_pickle", True),))


def _webarena() -> Sample:
    url = "http://shop:7770/"
    style = "<style>\n        pre {\n            white-space: pre-wrap;\n"
    style += "            word-wrap: break-word;\n        }\n"
    config = {"sites": ["shopping"], "task_id": 21, "start_url": url, "intent": "List", "intent_template_id": 2}
    body = "<pre>" + "".join(f"{k}: {v}\n" for k, v in config.items()) + "</pre>\n"
    said = "None"
    for raw, parsed in (("Look.\n```click [12]```", "click [12]"), ("Done. ```stop [x]```", "stop [x]")):
        body += f"<h2>New Page</h2>\n<h3 class='url'><a href={url}>URL: {url}</a></h3>\n"
        body += "<div class='state_obv'><pre>[12] link 'Reviews'</pre><div>\n"
        body += f"<div class='prev_action' style='background-color:pink'>{said}</div>\n"
        action = f"<div class='raw_parsed_prediction' style='background-color:grey'><pre>{raw}</pre></div>"
        action += "<div class='action_object' style='background-color:grey'><pre>{}</pre></div>"
        action += f"<div class='parsed_action' style='background-color:yellow'><pre>{parsed}</pre></div>"
        body += f"<div class='predict_action'>{action}</div>\n"
        said = parsed
    head = f"\n<!DOCTYPE html>\n<head>\n    {style}    </style>\n</head>\n<html>\n    <body>\n     "
    told = ("[Config file]: /runs/21.json", "[Intent]: List", "[Result] (PASS) /runs/21.json", "Average score: 1.0")
    log = "".join(f"2023-09-24 16:32:0{i},509 - INFO - {line}\n" for i, line in enumerate(told))
    html = File("run/render_21.html", (head + body + "\n    </body>\n</html>\n").encode())
    return Sample("webarena", (html, File("run/merged_log.txt", log.encode()), of_json("run/config.json", config)))


def _written() -> list[Sample]:
    """What our own exports write; Minari's where it is installed."""
    steps = (Step(step=0, observation="page", action="click[1]", reward=0.0),
             Step(step=1, messages='[{"role":"user","content":"a"}]', response="b", reward=1.0, terminated=True),
             Step(step=2, observation="end", is_final_observation=True))
    episodes = [Episode(source="jsonl", native_id=str(i), goal="Buy", seed=i, terminated=True, truncated=False,
                        steps=steps) for i in range(2)]
    made: list[Sample] = []
    for source, write in (("hf_datasets", hf_datasets.write), ("minari", minari.write)):
        if source == "minari" and not (find_spec("h5py") and find_spec("minari")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            top = Path(folder) / "ours-v0"
            write(episodes, top)
            files = [File(str(p.relative_to(folder)), p.read_bytes()) for p in sorted(top.rglob("*")) if p.is_file()]
        made.append(Sample(source, tuple(files), weight=0.3))
    return made


def _text(content: str) -> dict[str, Any]:
    return {"class_": "text_observation", "content": content, "source": "user"}


def _entry(kind: str, **fields: Any) -> dict[str, Any]:
    return {"metadata": {"id": "x", "agent": "a", "other": {}}, "kind": kind} | fields


DOM = {"ref": 1, "tag": "BODY", "children": [{"ref": 5, "tag": "BUTTON", "text": "Go", "id": "", "children": []}]}
MOUSE = [{"time": i + 1, "action": {"type": kind, "timing": 1, "x": 5, "y": 5}, "dom": DOM}
         for i, kind in enumerate(("mousedown", "mouseup", "click"))]
GOAL = {"asin": "B1", "instruction_text": "a red mug", "attributes": ["red"], "price_upper": 9.0}
VISITS = [{"page": "index", "url": "http://shop/s1/", "goal": GOAL},
          {"page": "search_results", "url": "http://shop/s1/r", "goal": GOAL,
           "content": {"keywords": ["mug"], "page": 1, "search_result_asins": ["B1"]}},
          {"page": "item_page", "url": "http://shop/s1/i", "goal": GOAL,
           "content": {"asin": "B1", "keywords": "['mug']", "page": "1", "options": {}}},
          {"page": "done", "url": "http://shop/s1/d", "goal": GOAL, "reward": 0.5, "reward_info": {"r": 1},
           "content": {"asin": "B1", "options": {}, "price": 5.0}}]
REACT = ("-----------------\n0\nAction: reset\nObservation: \nWebshop \nInstruction:  \na mug \n[Search] \n\n"
         "Action: search[mug]\nObservation: \n[B1] \n\nAction: think[It is good.]\nObservation: OK.\n\n"
         "Action: click[Buy Now]\nObservation: Your score (min 0.0, max 1.0): 0.75\n\n1 0.75 0.0 0.0\n"
         "-------------\n")
LATS = ["{}", "Iteration 1...", "PROMPT: x\n\nWebShop \nInstruction:  \na red mug \n[Search] \nAction: \n",
        r"SAMPLED ACTION: ['\nAction: search[mug]']", "{'fixed_4': {'session': 'fixed_4', 'page_type': 'init'}}",
        "NEW NODE: Node(depth=1, value=0.00, visits=0, action=search[mug], observation=\n[Blue] )",
        "PROMPT: x\n\nWebShop \nInstruction:  \na red mug \n[Search] \n\nAction: search[mug]\nObservation: \n[Blue] "
        "\nAction: \n", "{'fixed_4': {'session': 'fixed_4'}}", "reward:1.0",
        "NEW NODE: Node(depth=2, value=1.00, visits=0, action=click[Buy Now], "
        "observation=Your score (min 0.0, max 1.0): 1.0)"]
ADP = [_text("Buy a mug"), {"class_": "api_action", "function": "click", "kwargs": {"bid": "4"}, "description": "x"},
       {"class_": "web_observation", "html": "<p>", "axtree": "[4] link", "url": "http://x", "viewport_size": [1, 2],
        "image_observation": {"class_": "image_observation", "content": "a.png", "annotations": None}},
       {"class_": "code_action", "language": "bash", "content": "ls", "description": None}, _text("a.py"),
       {"class_": "message_action", "content": "Done.", "description": ""}]
GAME = {"step": 1, "state": {"observation": "A desk.\n\nYour task is to: heat.", "admissible_actions": ["go", "help"]},
        "agent_output": {"raw_response": "<think>Hm.</think><action>go</action>", "action": "go"},
        "transition": {"reward": 1.0, "done": True},
        "metadata": {"info": {"extra.gamefile": "a/b/c.tw-pddl", "won": True, "observation_text": "A cup."}}}
WORLD = {"metadata": {"environment": "alfworld", "timestamp": "t", "config": {"max_steps": 2, "seed": 42}},
         "trajectory": {"steps": [GAME], "total_reward": 1.0, "success": True, "length": 1}}
ATIF = {"schema_version": "ATIF-v1.8", "session_id": "s1", "agent": {"name": "t", "version": "2", "model_name": "m"},
        "final_metrics": {"total_cost_usd": 0.5}, "steps": [
            {"step_id": 1, "source": "user", "message": "Make b."},
            {"step_id": 2, "source": "agent", "message": "Look.", "reasoning_content": "hm", "timestamp":
             "2025-01-01T00:00:00Z", "tool_calls": [
                 {"tool_call_id": "c0", "function_name": "bash", "arguments": {"cmd": "ls"}}],
             "observation": {"results": [{"source_call_id": "c0", "content": "a.txt"}]}, "metrics": {
                 "prompt_token_ids": [1], "completion_token_ids": [2, 3], "logprobs": [-1.0, -2.0]}},
            {"step_id": 3, "source": "agent", "message": "Done."}]}
OUTPUT = {"evaluation_previous_goal": "ok", "memory": "m", "next_goal": "n", "action": [{"click": {"index": 3}}]}
STATE = {"url": "http://x/", "title": "T", "tabs": [{"url": "u", "title": "t"}], "interacted_element": [None],
         "screenshot_path": "a.png"}
RESULT = [{"is_done": True, "success": True, "extracted_content": "x", "error": None}]
USE = {"history": [{"model_output": OUTPUT, "result": RESULT, "state": STATE, "state_message": "page",
                    "metadata": {"step_start_time": 1.5, "step_end_time": 2.5, "step_number": 1}}]}
SHELL = {"environment": "ic_bash", "dataset": "./x.json", "task_id": 0, "query": "count", "turn_history": {
    "actions": ["ls", "wc"], "observations": ["a", "b"], "rewards": [0.5, 1.0], "valid_action": [True, False],
    "thoughts": ["Hm.", None]}, "summary": {"max_reward": 1.0, "turns_taken": 2, "turns_max": 10}}
FUSE = [{"id": f"g{i}", "traceId": "t", "type": kind, "name": "n", "input": TALK[:2], "output": TALK[4],
         "startTime": f"2025-01-01T00:00:0{i}.000Z", "endTime": "2025-01-01T00:00:09.000Z", "model": "m",
         "usageDetails": {"input": 10, "output": 2}, "costDetails": {"total": 0.25}, "parentObservationId": None}
        for i, kind in enumerate(("AGENT", "GENERATION", "TOOL", "GENERATION"))]
SCORE = {"id": "s1", "traceId": "t", "name": "helpful", "value": 0.5, "dataType": "NUMERIC", "source": "EVAL"}
SAID = [{"role": "user", "parts": [{"type": "text", "content": "Weather?"}]},
        {"role": "assistant", "parts": [{"type": "tool_call", "id": "1", "name": "f", "arguments": {"a": 1}}]}]
TOLD = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.input.messages": json.dumps(SAID[:1]),
        "gen_ai.output.messages": json.dumps(SAID[1:])}
LISTED = [{"key": k, "value": {"stringValue": v}} for k, v in TOLD.items()]
LISTED.append({"key": "gen_ai.usage.input_tokens", "value": {"intValue": "10"}})
SPAN = {"traceId": "4bf92f3577b34da6a3ce929d0e0e4736", "spanId": "00f067aa0ba902b7", "parentSpanId": "", "name": "c",
        "startTimeUnixNano": "1000000000", "endTimeUnixNano": "2000000000", "attributes": LISTED, "status": {},
        "events": [{"name": "gen_ai.evaluation.result", "attributes": [
            {"key": "gen_ai.evaluation.score.value", "value": {"doubleValue": 0.5}}]}]}
BATCH = {"resourceSpans": [{"resource": {"attributes": []}, "scopeSpans": [{"scope": {}, "spans": [SPAN]}]}]}
INFERENCE = {"context": {"trace_id": "0x1", "span_id": "0x2"}, "parent_id": None, "name": "llm", "start_time":
             "2025-01-01T00:00:00.000000Z", "end_time": "2025-01-01T00:00:01.000000Z", "attributes": {
                 "openinference.span.kind": "LLM", "llm.model_name": "m", "llm.input_messages.0.message.role": "user",
                 "llm.input_messages.0.message.content": "Hi", "llm.output_messages.0.message.role": "assistant",
                 "llm.output_messages.0.message.content": "Hello"}}
HANDS = [{"id": 0, "timestamp": "2024-11-02T10:00:00.5", "source": "user", "message": "", "action": "message",
          "args": {"content": "Fix the bug."}},
         {"id": 1, "source": "agent", "action": "run", "args": {"command": "ls", "thought": "Look."},
          "tool_call_metadata": {"function_name": "bash", "model_response": {"choices": [{"message": TALK[4]}]}}},
         {"id": 2, "source": "agent", "cause": 1, "observation": "run", "content": "a.py", "extras": {"a": {}}},
         {"id": 3, "source": "agent", "action": "finish", "args": {"outputs": {}, "thought": "Done."}}]
OPEN_HANDS = {"instance_id": "d-1", "instruction": "Fix.", "metadata": {"llm_config": {"model": "m"}, "dataset": "s",
              "agent_class": "A", "max_iterations": 30}, "error": None, "history": HANDS, "test_result": {"a": "d"},
              "metrics": {"accumulated_cost": 0.25}}
SNAP = {"snapshotName": "before@1", "frameId": "f", "frameUrl": "https://x.com/", "isMainFrame": True,
        "html": ["HTML", {}, ["HEAD", {}, ["TITLE", {}, "T"]], ["BODY", {"a": "b"}, ["P", {}, "hi"]]]}
TRACE = [{"type": "context-options", "version": 8, "browserName": "chromium", "wallTime": 1_700_000_000_000},
         {"type": "frame-snapshot", "snapshot": SNAP},
         {"type": "before", "callId": "1", "class": "Frame", "method": "click", "params": {"selector": "#go"},
          "startTime": 1.0, "pageId": "page@1", "beforeSnapshot": "before@1"},
         {"type": "input", "callId": "1", "point": {"x": 1, "y": 2}, "inputSnapshot": "input@1"},
         {"type": "frame-snapshot", "snapshot": SNAP | {"snapshotName": "after@1", "html": [[1, 2]]}},
         {"type": "after", "callId": "1", "afterSnapshot": "after@1", "endTime": 2.0, "error": {"message": "x"}}]
TURN = {"action": "ls\n", "observation": "a.py", "response": "I try.\n```\nls\n```", "thought": "I try.\n", "state":
        '{"open_file": "n/a"}', "query": TALK[:2], "execution_time": 0.5, "extra_info": {}}
SWE = {"environment": "main", "trajectory": [TURN, TURN], "history": [TALK[0], TALK[4] | {"is_demo": True}], "info": {
    "exit_status": "submitted", "submission": "d", "model_stats": {"instance_cost": 0.5, "tokens_sent": 9}},
    "replay_config": '{"agent": {"model": {"name": "m"}}}'}
TAPE = {"metadata": {"id": "t1", "author": "me", "result": {"reward": 0.5}}, "context": {"tools": []}, "steps": [
    _entry("page_observation", text="RootWebArea Shop", current_page=1), _entry("task", task="Buy"),
    _entry("reasoning_thought", reasoning="A."), _entry("click_action", bid="7", modifiers=[]),
    _entry("final_answer_action", text="Done.")]}
CANVAS = {"task_id": 3, "task_name": "Buy", "task_status": "limit", "step_list": [
    {"step_index": 1, "trace_description": {"thought": "t", "action": "a"}, "selector": "#q", "url": "https://m.com/",
     "action": "fill_search[7,red]", "task_score": "1 / 4", "task_score_rate": 0.25}]}
ROLLOUT = [{"trace_id": "7", "index": i, "prompt": "Find", "html": f"<html> {i}", "image": None, "url": "http://x/",
            "response": r, "target": "Find", "parsed_action": {"operation": "do"}} for i, r in enumerate(
                ('do(action="Search", argument="mug", element="13")', 'exit(message="9")'))]
DIGI = [[{"observation": "o", "next_observation": "p", "reward": 1.0, "done": True, "action": "a", "mc_return": 1.0,
          "trajectory_reward": 1.0, "task": "t"}]]
MIND = {"task_id": "0a", "task": "Find.", "final_result_response": "It.", "result_status": "success",
        "action_history": ["Click at (600, 47.5)", 'Type "x"'], "thoughts": ["", "S."]}
VOYAGE = [{"role": "system", "content": "Imagine."},
          {"role": "user", "content": "Now given a task: Find a mug.  Please interact with https://s.com/ and get the "
           "answer. \nObservation: A screenshot and some texts. (Omitted in context.)"},
          {"role": "assistant", "content": "Thought: I see.\n\nAction: Type [16]; red mug"},
          {"role": "user", "content": [{"type": "text", "text": 'Observation: x\n[16]: <input> "Search";'},
           {"type": "image_url", "image_url": {"url": "data:image/png;base64,{b64_img}"}}]},
          {"role": "assistant", "content": "Thought: I see.\n\nAction: ANSWER; It is $9"}]
STAMPED = "".join(f"2023-10-10 01:48:25,478 - INFO - {line}\n" for line in LATS)


def samples() -> list[Sample]:
    """One or more of each built-in format; every one is read without a complaint."""
    return [
        Sample("jsonl", (of_json("a.jsonl", EPISODE, EPISODE | {"success": False}),)),
        Sample("jsonl", (of_json("a.jsonl.gz", EPISODE, pack=gzip.compress),), weight=0.3),
        *_chat(),
        _agentlab(),
        _webarena(),
        *_written(),
        Sample("adp", (of_json("sample_std.json", [{"id": "a", "content": ADP, "details": {}}]),)),
        Sample("alfworld", (of_json("traj_1.json", WORLD),)),
        Sample("atif", (of_json("t__1/agent/trajectory.json", ATIF), File("t__1/verifier/reward.txt", b"1.0"),
                        of_json("t__1/result.json", {"task_name": "t"}))),
        Sample("browser_use", (of_json("AgentHistoryList.json", USE),)),
        Sample("intercode", (of_json("ic_bash.json", {"0": SHELL, "1": SHELL}),)),
        Sample("langfuse", (of_json("observations.jsonl", *FUSE, SCORE),)),
        Sample("miniwob_demos", (of_json("click-test/1.json", {"utterance": "Go", "rawReward": 1, "states": [
            {"time": 0, "action": None, "dom": DOM}, *MOUSE]}),)),
        Sample("online_mind2web", (of_json("run/0a/result.json", MIND),)),
        Sample("openhands", (of_json("output.jsonl", OPEN_HANDS, OPEN_HANDS | {"instance_id": "d-2"}),)),
        Sample("otel", (of_json("spans.jsonl", BATCH),), weight=0.6),
        Sample("otel", (of_json("spans.jsonl", INFERENCE),), weight=0.6),
        Sample("playwright_trace", (of_json("run/trace.zip", *TRACE, pack=zipped),)),
        Sample("reflexion", (of_json("env_results_trial_2.json", [{"name": "a", "memory": [], "is_success": False}]),)),
        Sample("swe_agent", (of_json("django__1.traj", SWE),)),
        Sample("tapeagents", (of_json("tape.json", TAPE),)),
        Sample("webarena_verified", (of_json("a/7/agent_response.json", {"a": 1}), of_json("a/7/eval_result.json", {
            "task_id": 7, "status": "success", "score": 1.0}), of_json("a/7/network.har", {"log": {}}))),
        Sample("webcanvas", (of_json("g/out.json", [CANVAS]),)),
        Sample("webrl", (of_json("traces/7.jsonl", *ROLLOUT), of_json("actions/7.json", {"task_id": 7, "score": 1.0}))),
        Sample("webrl", (of_json("a.jsonl", *DIGI),), weight=0.5),
        Sample("webshop_human", (of_json("s1.jsonl", *VISITS),)),
        Sample("webshop_lats", (File("run.log", STAMPED.encode()),)),
        Sample("webshop_react", (File("run.txt", REACT.encode()),)),
        Sample("webvoyager", (of_json("taskShop--3/interact_messages.json", VOYAGE),)),
    ]
