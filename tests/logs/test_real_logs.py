"""Every folder of real logs through ``source=auto`` into a store: what became of each record, beside its PROVENANCE.md.

A folder's own counts (episodes, steps, successes, failures, unlabelled) are parsed from its PROVENANCE.md. Where the
store holds others, each `Line` says why, and by how much; the lines add up to the difference, and where something left
in the store or in quarantine can show the number, its SQL does.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from offline_lm import logs
from offline_lm.store import Store
from offline_lm.store.ingest import add
from offline_lm.types import Episode, Rejected

COUNTS = ("episodes", "steps", "success", "failure", "unlabelled")
IN_STORE = """
    SELECT count(*), coalesce(sum(n_steps), 0)::int, count(*) FILTER (success), count(*) FILTER (NOT success),
        count(*) FILTER (success IS NULL)
    FROM episodes
"""
OUTCOMES = "SELECT count(*) FROM quarantine WHERE reason = 'outcome_only'"


@dataclass(frozen=True)
class Line:
    """One reason why the store differs from PROVENANCE.md, and by how much."""

    why: str
    episodes: int = 0
    steps: int = 0
    success: int = 0
    failure: int = 0
    unlabelled: int = 0
    shown_by: dict[str, int] = field(default_factory=dict)
    """SQL and the number it gives, where the store can show what the line says"""


@dataclass(frozen=True)
class Want:
    """What an ingest of a folder gives."""

    read: int
    accepted: int
    duplicates: int = 0
    by_reason: dict[str, int] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    others: dict[str, str] = field(default_factory=dict)
    """other counts of PROVENANCE.md, and the SQL that gives the same"""
    beside: dict[str, int] = field(default_factory=dict)
    """names or suffixes of the files that are no log by themselves, and how many there are"""


REFUSED_PICKLES = Line("pickles are read only where allow_pickle says so", episodes=-2, steps=-4, success=-2)
NO_STEP_FILES = Line(
    "the failed run has a summary and no step: an outcome for labels=", episodes=-1, failure=-1, shown_by={OUTCOMES: 1}
)
STUDY = {".csv": 2, ".md": 1, "study.pkl.gz": 1}
REAL: dict[str, Want] = {
    "adp": Want(
        read=42,
        accepted=38,
        duplicates=3,
        by_reason={"unknown_format": 1},
        lines=(
            Line("webarena_successful/sample_raw.json holds objects as Python's repr, which is no data: its 3 episodes"
                 " are one file that nobody reads", episodes=-3, steps=-8, unlabelled=-3,
                 shown_by={"SELECT count(*) FROM quarantine WHERE uri LIKE '%webarena_successful/sample_raw.json'": 1}),
            Line("webarena_successful/sample_std.json holds six rows, three of them distinct", episodes=-3, steps=-4,
                 unlabelled=-3,
                 shown_by={"SELECT count(*) FROM episodes WHERE dataset = 'webarena_successful'": 3}),
        ),
    ),
    "agentlab": Want(3, 0, by_reason={"pickle_refused": 2, "outcome_only": 1}, beside=STUDY,
                     lines=(REFUSED_PICKLES, NO_STEP_FILES)),
    "browser-use": Want(
        read=4,
        accepted=2,
        by_reason={"no_actions": 2},
        lines=(
            Line("two runs of 0.13 hold prompts and no reply (2 messages.json and 1): counted as steps, but no action"
                 " is known", episodes=-2, steps=-3, unlabelled=-2,
                 shown_by={"SELECT sum(regexp_extract(message, '^[0-9]+')::int)::int FROM quarantine": 3}),
        ),
    ),
    "intercode": Want(60, 60),
    "lats-webshop": Want(
        read=18,
        accepted=15,
        by_reason={"no_steps": 3},
        lines=(
            Line("an episode is not an iteration: 3 of the 6 were stopped before any node", episodes=-3,
                 shown_by={"SELECT count(*) FROM quarantine": 3}),
            Line("the other 3 are searches of 5 rollouts, and a rollout is an episode", episodes=12,
                 shown_by={"SELECT count(*) FROM episodes WHERE parent_episode_id IS NULL": 3}),
            Line("the 90 nodes are what the searches tried: candidates of the steps", steps=-90,
                 shown_by={"SELECT sum(len(candidates))::int FROM steps JOIN episodes USING (episode_id)"
                           " WHERE parent_episode_id IS NULL": 90}),
            Line("the steps are those of the 15 rollouts, 5 each", steps=75,
                 shown_by={"SELECT count(*) FROM episodes WHERE n_steps = 5": 15}),
        ),
    ),
    "miniwob-demos": Want(
        read=3861,
        accepted=3738,
        duplicates=21,
        by_reason={"no_steps": 102},
        lines=(
            Line("PROVENANCE does not say how it cut 172,102 DOM events into 20,069 steps; miniwob_demos says how it"
                 " cuts them, into 18,415", steps=18415 - 20069),
            Line("91 files without a state and 11 with the first page alone hold no action: 59 have reward 1, 9 a part"
                 " of it, 34 none", episodes=-102, success=-59, failure=-9 - 34,
                 shown_by={"SELECT count(*) FROM quarantine": 102}),
            Line("partial credit, which PROVENANCE counts apart, is no success", failure=322),
            Line("the 20 demonstrations of third-turk are copies of those in fourth-turk", episodes=-20, steps=-142,
                 success=-11, failure=-9,
                 shown_by={"SELECT count(*) FROM episodes WHERE dataset = '2017-10-26_third-turk'": 20}),
            Line("two of second-turk's grid-coordinate are the same to the last field but time", episodes=-1, steps=-1,
                 success=-1),
        ),
        others={"tasks": "SELECT count(DISTINCT task_id) FROM episodes"},
    ),
    "online-mind2web": Want(
        read=323,
        accepted=161,
        by_reason={"outcome_only": 161, "unknown_format": 1},
        lines=(
            Line("browser-use-cloud holds answers and a judge's score, no steps: for labels=, and no success",
                 episodes=-161, success=-157, failure=-4,
                 shown_by={OUTCOMES: 161, f"{OUTCOMES} AND message LIKE '%score 100)%'": 157,
                           f"{OUTCOMES} AND message LIKE '%score 0)%'": 4}),
            Line("Online_Mind2Web.json is the list of tasks, no log: one unknown file",
                 shown_by={"SELECT count(*) FROM quarantine WHERE uri LIKE '%/Online_Mind2Web.json'": 1}),
        ),
        beside={".png": 59},
    ),
    "openmanus-alfworld": Want(6, 6),
    "playwright-trace": Want(
        read=3,
        accepted=2,
        by_reason={"unsupported_version": 1},
        lines=(
            Line("the trace from the future is refused", episodes=-1, unlabelled=-1,
                 shown_by={"SELECT count(*) FROM quarantine WHERE message LIKE '%version 10000;%'": 1}),
            Line("PROVENANCE counts no steps; here they are the calls of the page's API", steps=3),
        ),
    ),
    "reflexion-webshop": Want(
        read=500,
        accepted=0,
        by_reason={"outcome_only": 500},
        lines=(
            Line("outcomes and reflections, no step: for labels=", episodes=-500, success=-168, failure=-332,
                 shown_by={f"{OUTCOMES} AND message LIKE '%: solved%'": 168,
                           f"{OUTCOMES} AND message LIKE '%: not solved%'": 332}),
        ),
    ),
    "swe-agent-traj": Want(5, 5),
    "tapeagents": Want(6, 6),
    "tau-bench": Want(92, 92, others={"tasks": "SELECT count(DISTINCT task_id) FROM episodes"}),
    "webarena-verified": Want(
        read=2,
        accepted=0,
        by_reason={"outcome_only": 2},
        lines=(
            Line("an answer, its score and the network's traffic, no step: for labels=", episodes=-2, success=-1,
                 failure=-1, shown_by={f"{OUTCOMES} AND message LIKE '%: success,%'": 1,
                                       f"{OUTCOMES} AND message LIKE '%: failure,%'": 1}),
        ),
    ),
    "webcanvas": Want(
        read=185,
        accepted=185,
        others={
            "tasks": "SELECT count(DISTINCT task_id) FROM episodes",
            "partial": "SELECT count(*) FROM episodes WHERE outcome_reward > 0 AND outcome_reward < 1",
            "status.finished": "SELECT count(*) FROM episodes WHERE end_reason = 'env_done'",
            "status.error": "SELECT count(*) FROM episodes WHERE end_reason = 'agent_error'",
            "status.limit": "SELECT count(*) FROM episodes WHERE end_reason = 'step_limit'",
        },
    ),
    "webshop-human": Want(5, 5, others={"mean_reward": "SELECT round(avg(outcome_reward), 3) FROM episodes"}),
    "webshop-react": Want(
        read=250,
        accepted=250,
        others={
            "partial": "SELECT count(*) FROM episodes WHERE outcome_reward > 0 AND outcome_reward < 1",
            "no_score": "SELECT count(*) FROM episodes WHERE list_contains(quality_flags, 'no_score')",
            "mean_reward": "SELECT round(avg(outcome_reward), 4) FROM episodes",
            "invalid_actions": "SELECT count(*) FROM steps WHERE NOT action_valid",
        },
    ),
    "webshop-sharegpt": Want(
        read=225,
        accepted=204,
        duplicates=21,
        lines=(
            Line("one conversation stands in the Parquet files twice (PROVENANCE has 204 tasks); the 20 more that are"
                 " read are rows of one of them again, as JSONL", episodes=-1, steps=-4, unlabelled=-1),
        ),
        others={"tasks": "SELECT count(*) FROM episodes"},
    ),
    "webvoyager": Want(
        read=18,
        accepted=18,
        others={"answered": "SELECT count(*) FROM episodes WHERE final_answer IS NOT NULL"},
        beside={".png": 11},
    ),
}  # fmt: skip
WITH_PICKLES = Want(3, 2, by_reason={"outcome_only": 1}, beside=STUDY, lines=(NO_STEP_FILES,))


def provenance(folder: Path) -> tuple[dict[str, int], dict[str, Any], int]:
    """(the COUNTS, the other counts, the number of files) of a PROVENANCE.md."""
    text = (folder / "PROVENANCE.md").read_text()
    (said,) = re.findall(r"^- episodes: .*?;", text, re.MULTILINE)
    counts = {name: int(number) for name, number in re.findall(r"(\w+):? (\d+)", said)}
    others = re.findall(r"^- other counts: (\{.*\})$", text, re.MULTILINE)
    (files,) = re.findall(r"^- files: (\d+)", text, re.MULTILINE)
    return counts, json.loads(others[0]) if others else {}, int(files)


def watched(records: Iterable[Episode | Rejected], uris: set[Path]) -> Iterator[Episode | Rejected]:
    for record in records:
        uris.add(Path(record.uri or ""))
        yield record


def check(folder: Path, tmp_path: Path, want: Want, source: str = "auto", **options: object) -> None:
    said, others, n_files = provenance(folder)
    assert set(said) == set(COUNTS)
    store = Store.create(tmp_path / "store")
    uris: set[Path] = set()
    counts = add(store, watched(logs.read(source, folder, **options), uris))

    assert counts["read"] == counts["accepted"] + counts["duplicates"] + counts["quarantined"]
    got = {name: counts[name] for name in ("read", "accepted", "duplicates", "by_reason")}
    assert got == {name: getattr(want, name) for name in got}

    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "PROVENANCE.md"]
    assert len(files) == n_files
    named = (file for file in files if not uris & {file, *file.parents})
    assert Counter(file.name if file.name in want.beside else file.suffix for file in named) == want.beside

    with store.connect() as db:

        def number(sql: str) -> Any:
            row = db.execute(sql).fetchone()
            assert row is not None
            return row[0]

        held = dict(zip(COUNTS, db.execute(IN_STORE).fetchone() or (), strict=True))
        assert held == {name: said[name] + sum(getattr(line, name) for line in want.lines) for name in COUNTS}
        assert (held["episodes"], held["steps"]) == (counts["accepted"], counts["steps"])
        for line in want.lines:
            assert {sql: number(sql) for sql in line.shown_by} == line.shown_by, line.why
        for name, sql in want.others.items():
            outer, _, inner = name.partition(".")
            assert number(sql) == (others[outer][inner] if inner else others[outer]), name


@pytest.mark.timeout(900)  # 40 s of CPU for the 3,861 files of miniwob-demos, on a machine that may be busy
@pytest.mark.parametrize("name", REAL)
def test_a_folder_of_real_logs(shared_data, tmp_path, name):
    check(shared_data / name, tmp_path, REAL[name])


def test_real_pickles_with_leave(shared_data, tmp_path):
    check(shared_data / "agentlab", tmp_path, WITH_PICKLES, source="agentlab", allow_pickle=True)


def test_no_folder_is_left_out(shared_data):
    assert {folder.name for folder in shared_data.iterdir() if folder.is_dir()} == set(REAL)


def test_the_miniwob_lines_beside_their_files(shared_data):
    """What the store cannot show of the 21 duplicates: which they are, by the names of their files."""
    third = {file.name for file in (shared_data / "miniwob-demos" / "2017-10-26_third-turk").rglob("*.json.gz")}
    fourth = {file.name for file in (shared_data / "miniwob-demos" / "2017-11-05_fourth-turk").rglob("*.json.gz")}
    assert len(third) == len(third & fourth) == 20
