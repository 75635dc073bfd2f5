"""Images of a log as the store's ``screenshot``: a hash, a type, and whether the picture is there.

Here a screenshot is a dict with ``sha256``, ``mime`` and ``status``, and, where there is a picture, either ``data``
(its bytes) or ``path`` (a Path, the file that holds it): the store keeps the picture beside the tables under its hash,
and drops these two keys. ``status`` is one of

- ``ok``: there was a picture (the store says ``stored`` once it has it)
- ``missing``: the log names a file that is not there
- ``lfs_pointer``: a Git LFS pointer stands in its place; ``sha256`` is that of the real picture
- ``removed``: the writer took it out (a placeholder, or base64 cut from the messages)
- ``too_large``: there is a file, or bytes, longer than MAX_IMAGE; it is left where it is
- ``damaged``: there are bytes, but not those of a picture
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import re
from pathlib import Path
from typing import Any

MAX_IMAGE = 64 << 20
"""Longest picture that is kept, in bytes."""
_LFS = re.compile(rb"\Aversion https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\n")
_DATA_URL = re.compile(r"\Adata:[\w/+.-]*;base64,")
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
)


def missing() -> dict[str, Any]:
    """A picture that the log names and does not hold."""
    return {"sha256": None, "mime": None, "status": "missing"}


def removed() -> dict[str, Any]:
    """A picture that the writer of the log took out."""
    return {"sha256": None, "mime": None, "status": "removed"}


def too_large() -> dict[str, Any]:
    """A picture longer than MAX_IMAGE."""
    return {"sha256": None, "mime": None, "status": "too_large"}


def of_file(path: Path) -> dict[str, Any]:
    """The picture in a file that may not exist; it is hashed, not kept in memory. A log may give the file any name."""
    try:
        if not path.is_file():
            return missing()
        if path.stat().st_size > MAX_IMAGE:
            return too_large()
        stream = path.open("rb")
    except (PermissionError, ValueError):  # not ours to read; a null character in the name, or half of one
        return missing()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return missing()
    digest = hashlib.sha256()
    with stream:
        head = stream.read(1 << 20)
        chunk = head
        while chunk:
            digest.update(chunk)
            chunk = stream.read(1 << 20)
    shot = _named(head, digest.hexdigest())
    return shot | {"path": path} if shot["status"] == "ok" else shot


def of_bytes(data: bytes) -> dict[str, Any]:
    """A picture in memory."""
    if len(data) > MAX_IMAGE:
        return too_large()
    shot = _named(data[:1024], hashlib.sha256(data).hexdigest())
    return shot | {"data": data} if shot["status"] == "ok" else shot


def of_base64(text: str) -> dict[str, Any]:
    """A picture in base64, with or without ``data:image/png;base64,`` before it."""
    prefix = _DATA_URL.match(text)
    try:
        data = base64.b64decode(text[prefix.end() if prefix else 0 :], validate=True)
    except (binascii.Error, ValueError):
        return {"sha256": None, "mime": None, "status": "damaged"}
    return of_bytes(data) if data else removed()


def _named(head: bytes, sha256: str) -> dict[str, Any]:
    if pointer := _LFS.match(head):
        return {"sha256": pointer[1].decode(), "mime": None, "status": "lfs_pointer"}
    mime = next((mime for magic, mime in _MAGIC if head.startswith(magic)), None)
    if mime is None and head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        mime = "image/webp"
    return {"sha256": sha256, "mime": mime, "status": "ok" if mime else "damaged"}
