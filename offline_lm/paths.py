"""Where conf/ and analysis/ are: inside the package in a wheel, beside it in a checkout. And where a reader ships."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    packaged = _PACKAGE / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


CONF = _folder("conf")
ANALYSIS = _folder("analysis")
READER = _PACKAGE / "reader"
