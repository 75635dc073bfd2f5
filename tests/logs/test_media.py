"""Pictures that a log names: whatever the name, and however long the file."""

from pathlib import Path

import pytest

from offline_lm.logs import _media
from offline_lm.store import Store
from offline_lm.store.media import Media
from offline_lm.types import Episode, Step

PNG = b"\x89PNG\r\n\x1a\n"
MISSING = {"sha256": None, "mime": None, "status": "missing"}
TOO_LARGE = {"sha256": None, "mime": None, "status": "too_large"}


@pytest.mark.parametrize(
    "name", ["none.png", "a" * 256, "a/" * 3000, "nul\0.png", "half\ud800.png", "", ".", "x.png/y"]
)
def test_a_name_that_is_no_file(tmp_path, name):
    (tmp_path / "x.png").write_bytes(PNG)
    assert _media.of_file(tmp_path / name) == MISSING


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)

    def refuse(*args, **keys):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert _media.of_file(tmp_path / "a.png") == MISSING


def test_the_disks_own_errors_are_told(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)

    def fail(*args, **keys):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        _media.of_file(tmp_path / "a.png")


def test_a_picture_that_is_too_large(tmp_path, monkeypatch):
    with (tmp_path / "a.png").open("wb") as file:
        file.write(PNG)
        file.truncate(_media.MAX_IMAGE + 1)  # a hole: it takes no space
    assert _media.of_file(tmp_path / "a.png") == TOO_LARGE
    monkeypatch.setattr(_media, "MAX_IMAGE", 9)
    assert _media.of_bytes(PNG + b"12") == TOO_LARGE
    assert _media.of_bytes(PNG + b"1")["status"] == "ok"


def test_a_picture_that_grew_since_it_was_hashed(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    shot = _media.of_file(path)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    episode = Episode(source="x", native_id="1", steps=(Step(step=0, observation="o", action="a", screenshot=shot),))
    (step,) = Media(Store.create(tmp_path / "store")).episode(episode).steps
    assert step.screenshot == {"sha256": shot["sha256"], "mime": "image/png", "status": "damaged"}
