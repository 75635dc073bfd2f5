"""The shape of the repository, and what importing the package costs."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    ".ci",
    ".github",
    ".gitignore",
    "LICENSE",
    "Makefile",
    "README.md",
    "analysis",
    "conf",
    "constraints.txt",
    "datasets",
    "offline_lm",
    "pyproject.toml",
    "tests",
}


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that is tracked or would be: what git does not ignore."""
    if not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [Path(name) for name in listing.stdout.split("\0") if name]


def test_top_level_holds_what_it_should_and_nothing_else(files):
    assert {path.parts[0] for path in files} == TOP_LEVEL


def test_datasets_hold_no_python(files):
    """A package there would shadow Hugging Face `datasets` for anyone who runs Python in the checkout."""
    assert [path for path in files if path.parts[0] == "datasets" and path.suffix == ".py"] == []


def test_names_of_tests_are_unique(files):
    """Without packages in tests/, pytest imports each file by its bare name."""
    names = [path.name for path in files if path.parts[0] == "tests" and path.suffix == ".py"]
    assert "__init__.py" not in names
    assert sorted(names) == sorted(set(names))


def test_importing_the_package_imports_neither_torch_nor_d3rlpy():
    heavy = "{'torch', 'd3rlpy', 'transformers'}"
    code = f"import sys, offline_lm, offline_lm.logs, offline_lm.store; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True, capture_output=True, text=True)
    assert run.stdout == "set()\n"
