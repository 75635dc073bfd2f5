"""Policies behind an OpenAI-compatible server: a real one on loopback, which answers /v1/chat/completions."""

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from offline_lm import _collect_models as models
from offline_lm import collect
from offline_lm._collect_policies import named
from offline_lm.envs.action_grammar import GRAMMAR
from offline_lm.envs.policies import State
from offline_lm.envs.written import Judge
from offline_lm.errors import UserError
from offline_lm.store import Store

pytest.importorskip("openai", reason="openai is not installed: pip install 'offline_lm[online]'")

KEY = "sk-test-0123456789"
PAGE = "<html>Hello</html>"


class Server(ThreadingHTTPServer):
    """Answers the n-th request by `script[n]`, and all after the last of it by its last entry.

    An entry is (status, what it says), or a function of the request's body that gives the answers.
    """

    daemon_threads = True

    def __init__(self, *script: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock = list(script), [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that waited no longer is what is tested
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            entry = self.server.script[min(len(self.server.seen), len(self.server.script) - 1)]
            self.server.seen.append({"path": self.path, "authorization": self.headers["Authorization"], **body})
        status, answer = entry if isinstance(entry, tuple) else (200, completion(body, entry(body)))
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if answer == PAGE else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def completion(body: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
    choices = []
    for i, answer in enumerate(answers):
        content = [{"token": "x", "bytes": None, "logprob": p, "top_logprobs": []} for p in answer.get("logprobs", ())]
        choice = {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": answer["text"]}}
        choice["logprobs"] = {"content": content} if content and body.get("logprobs") else None
        choices.append(choice | ({"token_ids": answer["ids"]} if "ids" in answer else {}))
    usage = {"prompt_tokens": 100, "completion_tokens": 5 * len(answers), "total_tokens": 0}
    ids = {"prompt_token_ids": [1, 2, 3]} if body.get("return_token_ids") else {}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices,
            "usage": usage, **ids}  # fmt: skip


@contextmanager
def serving(*script: Any) -> Iterator[Server]:
    with Server(*script) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def policy(server: Server, **settings: Any):
    given = {"env": "shop", "store": "none", "temperature": 1.0, "base_url": server.url, "retries": 0}
    return named("openai:some/model", **given | settings)


def state(**options: Any) -> State:
    given = {"goal": "Buy it.", "observation": "A page.", "actions": ("back", "buy"), "grammar": "exact"}
    return State(**given | options, rng=np.random.default_rng(5))


def first_listed(body: dict[str, Any]) -> list[dict[str, Any]]:
    """An agent that takes the first of the actions that its prompt lists."""
    asked = body["messages"][-1]["content"]
    action = asked.partition("\n\nActions:\n")[2].splitlines()[0]
    return [{"text": action, "logprobs": [-0.5, -0.25]}] * body["n"]


def test_episodes_by_a_server(tmp_path, capsys):
    """What it says is done and logged, and the key stands nowhere."""
    with serving(first_listed) as server:
        argv = ["env=shop", "policy=openai:some/model", f"base_url={server.url}", "temperature=1", "episodes=3"]
        argv += ["tasks=1", "max_steps=3", "pages=3", f"store={tmp_path / 'a'}", "json=true", "max_tokens=9"]
        assert collect.main(argv) == 0
        told = capsys.readouterr().out
    assert {r["path"] for r in server.seen} == {"/v1/chat/completions"}
    assert {r["authorization"] for r in server.seen} == {f"Bearer {KEY}"}
    assert {(r["model"], r["n"], r["temperature"], r["max_tokens"]) for r in server.seen} == {("some/model", 1, 1, 9)}
    assert len({r["seed"] for r in server.seen}) == 9
    with Store.open(tmp_path / "a").connect() as db:
        steps = db.execute(
            "SELECT action, response, response_logprobs, behavior_logprob, candidates, context_hash, action_error"
            " FROM steps WHERE action IS NOT NULL"
        ).fetchall()
        episodes = db.execute(
            "SELECT DISTINCT policy_id, policy_kind, model, sampling.temperature, sampling.max_tokens, tokens_in,"
            " tokens_out, extra FROM episodes"
        ).fetchall()
    assert len(steps) == json.loads(told.splitlines()[-1])["steps"] == 9
    for action, response, logprobs, logprob, candidates, _, error in steps:
        assert (action, logprobs, logprob, error) == (response, [-0.5, -0.25], -0.75, None)
        assert [c["source"] for c in candidates].count("sampled") == 1
    ((name, kind, model, temperature, limit, read, written, extra),) = episodes
    assert (name, kind, model) == ("openai-some/model-t1-m9-p16000", "llm", "some/model")
    assert (temperature, limit, read, written) == (1.0, 9, 300, 15)
    assert KEY not in told + extra
    files = [path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in data for data in files)


def test_best_of_n_by_a_critic(monkeypatch):
    """A server that gives two answers at once is asked until there are n; all pages at the same time."""
    monkeypatch.setattr(
        models, "judge", lambda *_: Judge("c", "c@0", "actions", lambda states: [np.array([0.1, 0.7]) for _ in states])
    )
    barrier = threading.Barrier(2, timeout=20)

    def two(body):
        if body["n"] == 3:
            barrier.wait()  # both pages are asked about before either is answered
            return [{"text": "back", "logprobs": [-1.0]}, {"text": "`buy`", "logprobs": [-2.0]}]
        return [{"text": "sell", "logprobs": [-3.0]}]

    with serving(two) as server:
        one, _ = policy(server, n=3, critic="run").act([state(), state(goal="Other.")])
    assert sorted(r["n"] for r in server.seen) == [1, 1, 3, 3]
    assert (one.action, one.logprob, one.tokens) == ("buy", None, (200, 15))
    assert [(c.action, c.response, c.logprob, c.score) for c in one.candidates] == [
        ("back", "back", -1.0, 0.1), ("buy", "`buy`", -2.0, 0.7), ("sell", "sell", -3.0, None),
    ]  # fmt: skip
    assert one.logged["response_logprobs"] == (-2.0,)


def test_probabilities_are_those_of_drawing_only_where_that_is_known():
    with serving(lambda body: [{"text": "back", "logprobs": [-0.5]}]) as server:
        (choice,) = policy(server, temperature=0.5).act([state()])
        assert (choice.logprob, choice.logged["response_logprobs"]) == (None, (-0.5,))
    with serving(lambda body: [{"text": "back", "logprobs": [-0.5, -math.inf]}]) as server:
        (choice,) = policy(server).act([state()])
        assert (choice.logprob, "response_logprobs" in choice.logged) == (None, False)


def test_token_ids_are_logged_where_a_server_gives_them():
    with serving(lambda body: [{"text": "back", "ids": [7, 8]}]) as server:
        (choice,) = policy(server, extra_body={"return_token_ids": True}).act([state()])
    logged = choice.logged
    assert (logged["prompt_token_ids"], logged["response_token_ids"]) == ((1, 2, 3), (7, 8))
    assert logged["tokenizer_id"] == "some/model"


def test_a_server_without_logprobs_is_asked_without(capsys):
    refusal = (400, {"error": {"message": "This model does not support logprobs."}})
    with serving(refusal, lambda body: [{"text": "back"}]) as server:
        agent = policy(server)
        choices = [agent.act([state()])[0], agent.act([state()])[0]]
    assert ["logprobs" in r for r in server.seen] == [True, False, False]
    assert [(c.action, c.logprob) for c in choices] == [("back", None)] * 2
    assert "gives no logprobs" in capsys.readouterr().out


def test_the_client_tries_again_and_then_says_why():
    busy = (503, {"error": {"message": "overloaded"}})
    with serving(busy, lambda body: [{"text": "buy"}]) as server:
        assert policy(server, retries=1).act([state()])[0].action == "buy"
        assert len(server.seen) == 2
    with serving(busy) as server, pytest.raises(UserError, match=r"127.0.0.1.* answers 503 .*overloaded"):
        policy(server).act([state()])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((401, {"error": {"message": "no"}}), r"answers 401 .*is \$OPENAI_API_KEY right\?"),
        ((404, {"error": {"message": "no"}}), "is there such a model"),
        ((400, {"error": {"message": "too long"}}), "refuses the request: .*too long"),
        ((200, "nonsense"), "answers what is no JSON"),
        ((200, PAGE), "gave no answer: does base_url= end"),
        (lambda body: [], "gave no answer"),
    ],
)
def test_what_a_server_refuses_is_told(entry, message):
    with serving(entry) as server, pytest.raises(UserError, match=message) as error:
        policy(server).act([state()])
    assert KEY not in str(error.value)


def test_one_that_does_not_answer_is_told():
    def slow(body):
        time.sleep(1.0)
        return [{"text": "buy"}]

    with serving(slow) as server, pytest.raises(UserError, match="does not answer in timeout_s="):
        policy(server, timeout_s=0.2).act([state()])
    with pytest.raises(UserError, match=r"cannot be reached .*does it run"):
        policy(server).act([state()])


def test_no_key_no_server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match=r"set \$OPENAI_API_KEY, or name a server with base_url="):
        named("openai:gpt", env="shop", store="none")
    with serving(lambda body: [{"text": "buy"}]) as server:  # one of one's own may want none
        assert policy(server).act([state()])[0].action == "buy"


def test_an_answer_is_never_more_than_a_text():
    """No content, half a character, code: an action that the environment refuses."""
    with serving(lambda body: [{"text": None}], lambda body: [{"text": "\ud83d()"}]) as server:
        agent = policy(server)
        assert agent.act([state(grammar=GRAMMAR)])[0].action == ""
        assert agent.act([state(grammar=GRAMMAR)])[0].action == "?()"
