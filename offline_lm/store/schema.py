"""Arrow schemas of every table of the store.

Names and meaning are those of DESIGN section 8; ``episodes`` and ``steps`` mirror `offline_lm.types`. Null
always means "not logged". JSON of no fixed shape (``extra``, ``action_args``, ``config`` ...) is text, so
that one odd record cannot change the type of a column. Times are UTC with microseconds. Rewards are float64
whatever was logged first.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1
VERSION_KEY = "offline_lm.schema_version"
"""Key of `SCHEMA_VERSION` in the configuration of every Delta table."""

_text, _big, _f64, _i64, _bool = pa.string(), pa.large_string(), pa.float64(), pa.int64(), pa.bool_()
_time = pa.timestamp("us", tz="UTC")


def _struct(**fields: pa.DataType) -> pa.StructType:
    return pa.struct(list(fields.items()))


CANDIDATE = _struct(action=_text, response=_text, logprob=_f64, score=_f64, source=_text, executed=_bool)
LABEL = _struct(kind=_text, labeler=_text, name=_text, value=_f64, reason=_text)
PROVENANCE = _struct(adapter=_text, adapter_version=_text, uri=_text, sha256=_text, native_id=_text, licence=_text)
SAMPLING = _struct(temperature=_f64, top_p=_f64, top_k=_i64, max_tokens=_i64, n=_i64, seed=_i64)
SCREENSHOT = _struct(sha256=_text, mime=_text, status=_text)
TARGET = _struct(ref=_text, tag=_text, role=_text, text=_text)

EPISODES = pa.schema(
    {
        "episode_id": _text,
        "content_hash": _text,
        "ingest_id": _text,
        "source": _text,
        "dataset": _text,
        "benchmark": _text,
        "task_id": _text,
        "task_family": _text,
        "site": _text,
        "start_url": _text,
        "goal": _text,
        "seed": _i64,
        "trial": _i64,
        "policy_id": _text,
        "policy_kind": _text,
        "model": _text,
        "agent": _text,
        "sampling": SAMPLING,
        "outcome_reward": _f64,
        "raw_reward": _f64,
        "success": _bool,
        "self_reported_success": _bool,
        "terminated": _bool,
        "truncated": _bool,
        "end_reason": _text,
        "final_answer": _text,
        "labels": pa.list_(LABEL),
        "parent_episode_id": _text,
        "branch_step": _i64,
        "n_steps": _i64,  # decisions: the final observation is not counted
        "started_at": _time,
        "duration_s": _f64,
        "tokens_in": _i64,
        "tokens_out": _i64,
        "cost_usd": _f64,
        "provenance": PROVENANCE,
        "quality_flags": pa.list_(_text),
        "extra": _text,
    }
)

STEPS = pa.schema(
    {
        "episode_id": _text,
        "ingest_id": _text,  # a step is visible only with the episode of the same ingest
        "step": _i64,
        "is_final_observation": _bool,
        "ts_start": _time,
        "ts_end": _time,
        "url": _text,
        "title": _text,
        "observation": _big,
        "observation_kind": _text,
        "observation_error": _text,
        "screenshot": SCREENSHOT,
        "messages": _big,
        "context_hash": _text,
        "response": _big,
        "thought": _text,
        "action": _text,
        "action_name": _text,
        "action_args": _text,
        "action_grammar": _text,
        "sub_actions": pa.list_(_text),
        "target": TARGET,
        "action_valid": _bool,
        "action_error": _text,
        "candidates": pa.list_(CANDIDATE),
        "candidates_complete": _bool,
        "prompt_token_ids": pa.list_(pa.int32()),
        "response_token_ids": pa.list_(pa.int32()),
        "response_logprobs": pa.list_(_f64),
        "behavior_logprob": _f64,
        "tokenizer_id": _text,
        "reward": _f64,
        "reward_source": _text,
        "progress": _f64,
        "terminated": _bool,
        "truncated": _bool,
        "source_offset": _i64,
        "extra": _text,
    }
)

QUARANTINE = pa.schema(
    {
        "source": _text,
        "uri": _text,
        "source_offset": _i64,  # byte offset of the record, or its index
        "sha256": _text,
        "reason": _text,
        "message": _text,
        "excerpt": _text,
        "ingest_id": _text,
        "quarantined_at": _time,
    }
)

# Written twice: when a run starts (status `running`) and when it ends (`finished` or `interrupted`).
RUNS = pa.schema(
    {
        "run_id": _text,
        "status": _text,
        "command": _text,
        "algo": _text,
        "model": _text,
        "seed": _i64,
        "started_at": _time,
        "finished_at": _time,
        "seconds": _f64,
        "steps": _i64,
        "run_dir": _text,
        "git_revision": _text,
        "package_version": _text,
        "store_versions": _text,  # JSON: table -> version trained on
        "config": _text,  # JSON
        "metrics": _text,  # JSON: name -> value, at the end
        "extra": _text,
        "written_at": _time,  # set by Store.append; the newest row of a run stands
    }
)

METRICS = pa.schema({"run_id": _text, "step": _i64, "name": _text, "value": _f64})

# One row for each step a run scored; the final observation of an episode has a row with v alone.
VALUES = pa.schema(
    {
        "run_id": _text,
        "episode_id": _text,
        "step": _i64,
        "split": _text,
        "v": _f64,
        "q": _f64,
        "q_ensemble": pa.list_(_f64),
        "advantage": _f64,
        "td_error": _f64,
        "return": _f64,
        "return_mask": _bool,
        "bootstrap_mask": _bool,
    }
)

CANDIDATE_VALUES = pa.schema(
    {
        "run_id": _text,
        "episode_id": _text,
        "step": _i64,
        "candidate": _i64,  # 0-based position in steps.candidates
        "action": _text,
        "q": _f64,
        "executed": _bool,
    }
)

DIAGNOSTICS = pa.schema(
    {
        "run_id": _text,
        "suite": _text,
        "name": _text,
        "split": _text,
        "group": _text,
        "value": _f64,
        "low": _f64,
        "high": _f64,
        "n": _i64,
        "extra": _text,
    }
)

TABLES: dict[str, pa.Schema] = {
    "episodes": EPISODES,
    "steps": STEPS,
    "runs": RUNS,
    "metrics": METRICS,
    "values": VALUES,
    "candidate_values": CANDIDATE_VALUES,
    "diagnostics": DIAGNOSTICS,
    "quarantine": QUARANTINE,
}

LONG_TEXT: dict[str, tuple[str, ...]] = {
    "steps": ("observation", "messages", "response", "thought", "extra"),
    "episodes": ("goal", "final_answer", "extra"),
    "runs": ("config", "metrics"),
}
"""Columns where a dictionary and min/max statistics cost much and help nobody."""

# What Delta keeps min/max of in its log: the keys alone, or pages of text would end up there.
_KEYS = ("episode_id", "run_id", "step", "source")


def stats_columns(table: str) -> str:
    """The columns of ``table`` whose statistics Delta keeps, comma-separated."""
    return ",".join(name for name in _KEYS if name in TABLES[table].names)
