"""The front door: which formats there are, and what a user's mistake says."""

import pytest

from offline_lm.errors import UserError
from offline_lm.logs import read, sources


def test_built_in_sources():
    assert {"jsonl", "miniwob_demos"} <= set(sources())
    assert not any(name.startswith("_") for name in sources())


def test_unknown_source_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="miniwob_demos"):
        read("jsonlines", tmp_path)


def test_missing_path_is_told_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        read("jsonl", tmp_path / "nowhere.jsonl")


def test_folder_without_logs(tmp_path):
    with pytest.raises(UserError, match=r"holds no file that ends in \.jsonl"):
        list(read("jsonl", tmp_path))


def test_unknown_option(tmp_path):
    with pytest.raises(UserError, match="colour"):
        read("jsonl", tmp_path, colour="red")


def test_an_entry_point_adds_a_source(tmp_path, monkeypatch):
    package = tmp_path / "third_party-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[offline_lm.logs]\nmine = third_party:read\n")
    (tmp_path / "third_party.py").write_text("def read(path):\n    return iter([path.name])\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "mine" in sources()
    assert list(read("mine", tmp_path / "third_party.py")) == ["third_party.py"]
