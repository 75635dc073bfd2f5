"""The built wheel, installed away from the checkout: a user's first minute with it."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
# The smallest run that still trains every stage.
FIT_SMALL = [
    *("model=tiny", "model.vocab_size=300", "model.width=32", "model.layers=1", "model.stage.tokens=2000"),
    *("optim.steps=20", "optim.batch_size=16", "optim.warmup=2"),
]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, where nothing leads back to the checkout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=CHECKOUT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """The bin folder of a new virtual environment with the wheel in it.

    Dependencies come from the environment that runs the tests, by a .pth file: installing torch once more
    would take minutes. Such a folder stands behind the new environment's own packages, and its own .pth files
    (the editable install of the checkout) are not read.
    """
    root = tmp_path_factory.mktemp("bare")
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=root)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=root).strip())
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(theirs)) + "\n")
    return root / "bin"


def test_it_carries_the_package_its_configuration_and_its_questions(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "offline_lm").rglob("*.py")}
    assert here <= names
    for folder, pattern in (("conf", "*.yaml"), ("analysis", "*.sql")):
        ours = {f"offline_lm/{path.relative_to(CHECKOUT).as_posix()}" for path in (CHECKOUT / folder).rglob(pattern)}
        assert ours, f"{folder}/ is empty"
        assert ours <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"offline_lm"}


def test_it_is_used_without_the_checkout(bare, tmp_path):
    code = "from offline_lm import paths; print(paths.__file__, paths.CONF, paths.ANALYSIS)"
    for path in run(bare / "python", "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(bare.parent.resolve()), path


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_every_command_has_help_and_a_console_script(bare, tmp_path, script):
    module = script.replace("offline-lm-", "offline_lm.")
    by_module = run(bare / "python", "-m", module, "--help", cwd=tmp_path)
    assert f"python -m {module}" in by_module
    assert run(bare / script, "--help", cwd=tmp_path) == by_module


def episode(number: int) -> dict:
    """Pressing the button that the goal names wins; the others do not."""
    goal, pressed = f"button {number % 3}", f"button {number % 4}"
    won = goal == pressed
    buttons = [{"action": f"press {name}"} for name in ("button 0", "button 1", "button 2", "button 3")]
    steps = [
        {"observation": "A closed panel.", "action": "open", "reward": 0.0},
        {
            "observation": "A panel with buttons 0 to 3.",
            "action": f"press {pressed}",
            "reward": float(won),
            "candidates": buttons,
            "candidates_complete": True,
        },
    ]
    identity = {
        "task_id": f"panel/{number % 6}",
        "seed": number,
        "policy_id": "test",
        "policy_kind": "scripted",
    }
    return {**identity, "goal": f"Press {goal}.", "success": won, "terminated": True, "steps": steps}


def test_logs_in_and_values_out(bare, tmp_path):
    log = tmp_path / "panel.jsonl"
    log.write_text("".join(json.dumps(episode(number)) + "\n" for number in range(24)))
    store = tmp_path / "store"

    def command(name: str, *arguments: str) -> str:
        return run(bare / "python", "-m", f"offline_lm.{name}", *arguments, cwd=tmp_path)

    ingested = command("ingest", "source=jsonl", f"path={log}", f"store={store}", "json=true")
    counts = json.loads(ingested.strip().splitlines()[-1])
    assert (counts["read"], counts["accepted"], counts["episodes"], counts["steps"]) == (24, 24, 24, 48)
    fitted = command("fit", "algo=iql_lm", f"data.store={store}", "json=true", *FIT_SMALL)
    assert json.loads(fitted.strip().splitlines()[-1])["run_id"]
    sql = "SELECT count(*) AS n FROM latest_values WHERE v IS NOT NULL AND q IS NOT NULL"
    rows = command("query", sql, f"store={store}", "format=json")
    assert json.loads(rows) == [{"n": 48}]
    panel = {"goal": "Press button 1.", "observation": "A panel.", "candidates": ["press button 1", "open"]}
    (tmp_path / "panel.jsonl").write_text(json.dumps(panel) + "\n")
    command("score", "input=panel.jsonl", "output=scored.jsonl", f"store={store}")
    scored = json.loads((tmp_path / "scored.jsonl").read_text())
    assert isinstance(scored["v"], float)
    assert len(scored["q"]) == 2
