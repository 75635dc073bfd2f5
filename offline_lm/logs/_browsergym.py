"""BrowserGym's actions (``click('18')``, several a step) as name, arguments and target, and what its files say of
a run. The text of an action is parsed, never run."""

from __future__ import annotations

import ast
import math
import re
from datetime import UTC, datetime
from typing import Any

from offline_lm.logs._adapters import take
from offline_lm.logs._chat import ASSISTANT, content_text
from offline_lm.logs._records import Bad

_LONGEST = 8192
_PARAMETERS = {
    "noop": "wait_ms",
    "scroll": "delta_x delta_y",
    "fill": "bid value enable_autocomplete_menu",
    "check": "bid",
    "uncheck": "bid",
    "select_option": "bid options",
    "click": "bid button modifiers",
    "dblclick": "bid button modifiers",
    "hover": "bid",
    "press": "bid key_comb",
    "focus": "bid",
    "clear": "bid",
    "drag_and_drop": "from_bid to_bid",
    "upload_file": "bid file",
    "mouse_move": "x y",
    "mouse_up": "x y button",
    "mouse_down": "x y button",
    "mouse_click": "x y button",
    "mouse_dblclick": "x y button",
    "mouse_drag_and_drop": "from_x from_y to_x to_y",
    "mouse_upload_file": "x y file",
    "keyboard_press": "key",
    "keyboard_down": "key",
    "keyboard_up": "key",
    "keyboard_type": "text",
    "keyboard_insert_text": "text",
    "goto": "url",
    "tab_focus": "index",
    "send_msg_to_user": "text",
    "report_infeasible": "reason",
}
"""Names of the positional parameters (``browsergym/core/action/functions.py``)."""
_ANSWERS = {"send_msg_to_user": "text", "report_infeasible": "reason"}


def parsed(action: str, page: str) -> dict[str, Any]:
    """Fields of a Step that say what `action` was; none where it is no plain call, as Python code may be.

    Of several calls the first names the step, as elsewhere, and all are `sub_actions`.
    """
    calls = _calls(action)
    if not calls:
        return {}
    name, args, _ = calls[0]
    fields: dict[str, Any] = {"action_name": name, "action_args": args}
    if len(calls) > 1:
        fields["sub_actions"] = tuple(text for _, _, text in calls)
    ref = args.get("bid", args.get("from_bid"))
    if type(ref) is str:
        fields["target"] = {"ref": ref} | _element(ref, page)
    return fields


def answer(name: Any, args: Any) -> str | None:
    """What the agent told the user, if that was its action."""
    text = args.get(_ANSWERS[name]) if name in _ANSWERS and type(args) is dict else None
    return text if type(text) is str else None


def _calls(action: str) -> list[tuple[str, dict[str, Any], str]]:
    """(name, arguments, text) of each call, or nothing if a statement is no call with literal arguments."""
    if len(action) > _LONGEST:
        return []
    try:
        statements = ast.parse(action.strip()).body
        return [_call(statement, action.strip()) for statement in statements]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what ast.parse and literal_eval raise
        return []


def _call(statement: ast.stmt, source: str) -> tuple[str, dict[str, Any], str]:
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("no call")
    names = _PARAMETERS.get(call.func.id, "").split()
    args: dict[str, Any] = {}
    for i, argument in enumerate(call.args):
        args[names[i] if i < len(names) else f"arg{i}"] = _literal(argument)
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("no plain keyword")
        args[keyword.arg] = _literal(keyword.value)
    return call.func.id, args, ast.get_source_segment(source, call) or source


def _literal(node: ast.expr) -> Any:
    """A literal of JSON's own types."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    value = ast.literal_eval(node)
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError("an integer over 64 bits")
    if type(value) not in (str, int, float, bool, type(None)):
        raise ValueError("no plain value")
    return value


def _element(ref: str, page: str) -> dict[str, str]:
    """Role and name of the element, from its line of the accessibility tree."""
    found = re.search(rf"^\s*\[{re.escape(ref)}\] (\w+) '(.*?)'(?:,|$)", page, re.MULTILINE)
    return {"role": found[1], "text": found[2]} if found else {}


# --- what its files say ---------------------------------------------------------------------------------------

_FOLDER = re.compile(
    r"_?(?P<date>\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)_(?P<agent>.+)_on_(?P<task>.+?)_(?P<seed>\d{1,18})(?:_\w+)?\Z"
)


def was_asked(info: dict[str, Any]) -> bool:
    """Whether the agent answered: only then are the step's stats made (``from_action``)."""
    return type(info.get("stats")) is dict


def conversation(logged: Any, place: str) -> tuple[list[dict[str, str]], list[str]]:
    """(prompt, replies) of a Discussion, whichever way its version was pickled: lists, dicts, subclasses of dict."""
    if type(logged) is dict:
        logged = logged.get("messages", logged.get("items"))
    prompt: list[dict[str, str]] = []
    replies: list[str] = []
    for i, item in enumerate(logged if type(logged) is list else ()):
        if type(item) is not dict:
            continue
        held = next((item[key] for key in ("items", "__dict__") if type(item.get(key)) is dict), item)
        role = held.get("role", held.get("type"))
        if type(role) is not str or type(held.get("content")) not in (str, list):
            continue
        text, _ = content_text(held["content"], f"{place}[{i}].content")
        if role in ASSISTANT:
            replies.append(text)
        elif not replies:
            prompt.append({"role": role, "content": text})
    return prompt, replies


def time_of(info: dict[str, Any], key: str) -> datetime | None:
    value = take(take(info, "profiling", dict, "step") or {}, key, float, "profiling")
    if not value:
        return None
    if not 0 < value < 1e11:
        raise Bad("out_of_range", f"profiling.{key} is {value}, not a time in seconds")
    return datetime.fromtimestamp(value, UTC)


def raw_reward(last: dict[str, Any]) -> float | None:
    """MiniWoB's own reward; StepInfo.raw_reward is never filled where the task reports one level lower."""
    if (raw := take(last, "raw_reward", float, "the last step")) is not None:
        return raw
    told = last.get("task_info")
    return take(told, "RAW_REWARD_GLOBAL", float, "task_info") if type(told) is dict else None


def task_of(args: dict[str, Any], name: str) -> dict[str, Any]:
    """Task and agent, from exp_args or, where that is missing, from the folder's name."""
    env = take(args, "env_args", dict, "exp_args") or {}
    agent = take(args, "agent_args", dict, "exp_args") or {}
    model = take(agent, "chat_model_args", dict, "agent_args") or {}
    named = match.groupdict() if (match := _FOLDER.match(name)) else {}
    task = take(env, "task_name", str, "env_args") or named.get("task")
    seed = take(env, "task_seed", int, "env_args")
    if seed is None and "seed" in named and "task_name" not in env:
        seed = int(named["seed"])
    benchmark, _, rest = (task or "").partition(".")
    agent_name = take(agent, "agent_name", str, "agent_args") or named.get("agent")
    sampling = {
        "temperature": take(model, "temperature", float, "chat_model_args"),
        "max_tokens": take(model, "max_new_tokens", int, "chat_model_args"),
    }
    return {
        "benchmark": benchmark or None,
        "task_id": task,
        "task_family": rest if rest and not rest[0].isdigit() else None,
        "seed": seed,
        "policy_id": agent_name,
        "agent": agent_name,
        "model": take(model, "model_name", str, "chat_model_args"),
        "sampling": sampling if any(value is not None for value in sampling.values()) else None,
        "screenshots": args.get("save_screenshot") is True,
    }


def cost_of(infos: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    def total(*keys: str) -> float | None:
        for key in keys:
            if (value := take(summary, f"stats.cum_{key}", float, "summary_info.json")) is not None:
                return value
        stats = [info["stats"] for info in infos if was_asked(info)]
        values = [take(one, key, float, "stats") for one in stats for key in keys if key in one]
        return math.fsum(value for value in values if value is not None) if values else None

    tokens_in, tokens_out = (
        total("input_tokens", "openai_prompt_tokens"),
        total("output_tokens", "openai_completion_tokens"),
    )
    times = [time for info in infos for key in ("env_start", "env_stop", "agent_stop") if (time := time_of(info, key))]
    return {
        "tokens_in": None if tokens_in is None else round(tokens_in),
        "tokens_out": None if tokens_out is None else round(tokens_out),
        "cost_usd": total("cost", "openai_total_cost"),
        "started_at": min(times, default=None),
        "duration_s": (max(times) - min(times)).total_seconds() if times else None,
    }
