"""Log formats, one module each: ``read(path) -> Iterator[Episode | Rejected]``.

A module of this package whose name has no leading underscore is a format. A third party adds one by an entry
point of the group ``offline_lm.logs`` that names such a ``read`` function, e.g. ``mine =
"my_package.mine:read"``.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from offline_lm.errors import UserError
from offline_lm.types import Episode, Rejected

GROUP = "offline_lm.logs"
Reader = Callable[..., Iterator[Episode | Rejected]]


def _built_in() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def sources() -> list[str]:
    """The names that `read` takes as `source`: the built-in formats and those of installed packages."""
    return sorted({*_built_in(), *entry_points(group=GROUP).names})


def _reader(source: str) -> Reader:
    built_in = source in _built_in()
    installed = list(entry_points(group=GROUP, name=source))
    if built_in + len(installed) > 1:
        owners = ["offline_lm"] * built_in + [point.value for point in installed]
        raise UserError(f"source={source} is defined twice, by {', '.join(owners)}; uninstall one")
    if built_in:
        return import_module(f"{__name__}.{source}").read
    if installed:
        return installed[0].load()
    raise UserError(f"source={source} is not a known log format; take one of: {', '.join(sources())}")


def read(source: str, path: Path, **options: object) -> Iterator[Episode | Rejected]:
    """Yield every record of the log at `path`, a file or a folder, as an Episode or a Rejected.

    Files are read in sorted order and one record is held at a time. `options` go to the format's own
    ``read``.

    Raises:
        UserError: at once, for an unknown source, a path that does not exist, or an option that the format
        lacks.
    """
    reader = _reader(source)
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; path= must name a log file or a folder of them")
    try:
        inspect.signature(reader).bind(path, **options)
    except TypeError as error:
        raise UserError(f"source={source}: {error}") from None
    return reader(path, **options)
