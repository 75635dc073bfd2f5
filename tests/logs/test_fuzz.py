"""Damaged logs of every format: only episodes and rejected records come out, soon and in bounded memory.

`analysis/benchmarks/fuzz.py` does the same with a hundred thousand inputs.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from offline_lm import logs
from offline_lm.logs._reasons import REASONS

INPUTS = 1500


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    pytest.importorskip("datasets")  # it writes one of the samples
    path = Path(__file__).resolve().parents[2] / "analysis" / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("offline_lm_fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_every_format_has_a_sample_that_is_read_whole(fuzz, tmp_path):
    made = fuzz.Fuzz(tmp_path)
    for i, sample in enumerate(made.samples):
        ((accepted, rejected),) = made.read(i)
        outcomes_only = sample.source in ("reflexion", "webarena_verified")
        assert (accepted > 0, rejected > 0) == (not outcomes_only, outcomes_only), sample.source
    assert set(made.reasons) == {"outcome_only"}
    without = {"minari"} - {sample.source for sample in made.samples}  # an optional extra
    assert {sample.source for sample in made.samples} | without == set(logs.sources())


def test_damaged_logs(fuzz, tmp_path):
    before = fuzz.peak_memory_mb()
    made = fuzz.Fuzz(tmp_path, seed=3)
    made.run(INPUTS)
    assert made.failures == {}
    assert made.inputs.total() == INPUTS
    assert set(made.inputs) >= {sample.source for sample in made.samples if sample.weight == 1}
    assert made.accepted.total() > INPUTS / 4
    assert made.rejected.total() > INPUTS / 4
    assert set(made.reasons) <= set(REASONS)
    assert made.slowest < 10
    assert fuzz.peak_memory_mb() - before < 500


def test_the_same_seed_damages_the_same(fuzz):
    sample = fuzz.samples()[0]
    made = [
        [fuzz.mutate(rng, sample.files[0]) for _ in range(50)] for rng in (fuzz.random.Random(1), fuzz.random.Random(1))
    ]
    assert made[0] == made[1]
    assert len(set(made[0])) > 40
