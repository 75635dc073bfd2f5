"""The only way out of the browser: a proxy on the loopback that lets one origin through and refuses the rest.

Chromium sends everything through its proxy, whatever asked for it: pages, scripts, workers, WebSockets, its own calls
home. So one place says no, where interception in the page would have to name every way there is, and would switch the
cache off. A folder is served here too, under a host name of its own, so that its URLs are the same in every run.
"""

from __future__ import annotations

import asyncio
import mimetypes
from pathlib import Path
from urllib.parse import unquote, urlsplit

from offline_lm.errors import UserError

_LONGEST_HEAD = 1 << 16
_REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class Gate:
    """Lets requests to one origin through.

    Args:
        origin: ``http://host:port`` or ``https://host``; of a URL the path is ignored.
        folder: served as that origin; None: the origin is a real server, and is asked.

    Attributes:
        refused: the newest of the requests that were not let through, at most 100.

    Raises:
        UserError: an origin that is no http(s) URL.
    """

    def __init__(self, origin: str, folder: Path | None = None) -> None:
        try:
            self.origin, self.host, self.port = _origin(origin)
        except ValueError as error:
            raise UserError(f"{origin}: a URL such as http://host:port/ is wanted") from error
        self.folder = None if folder is None else folder.resolve()
        self.refused: list[str] = []
        self._files: dict[str, bytes] = {}
        self._server: asyncio.Server | None = None

    async def open(self) -> str:
        """Starts listening; the proxy's URL."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_LONGEST_HEAD)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError):
            pass  # the browser closed the connection, or does not speak HTTP
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; whether another may follow on this connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        line = head.split(b"\r\n", 1)[0].decode("latin-1")
        method, target, _ = line.split(" ")
        if method == "CONNECT":  # https, and WebSockets
            allowed = self.folder is None and target == f"{self.host}:{self.port}"
            if allowed:
                await self._tunnel(reader, writer, b"HTTP/1.1 200 Connection established\r\n\r\n", b"")
        elif allowed := _origin(target)[0] == self.origin:
            if self.folder is not None:
                writer.write(self._file(urlsplit(target).path) if method in ("GET", "HEAD") else _MISSING)
                return method == "GET"
            url = urlsplit(target)
            path = (url.path or "/") + (f"?{url.query}" if url.query else "")
            fields = [field for field in head.split(b"\r\n")[1:-2] if not field.lower().startswith(b"proxy-")]
            fields = [field for field in fields if not field.lower().startswith(b"connection:")]
            asked = b"\r\n".join([f"{method} {path} HTTP/1.1".encode("latin-1"), *fields, b"Connection: close"])
            await self._tunnel(reader, writer, b"", asked + b"\r\n\r\n")
        if not allowed:
            self.refused = [*self.refused[-99:], line]
            writer.write(_REFUSED)
        return False

    def _file(self, path: str) -> bytes:
        """The whole answer; kept, for a few files are asked for again and again."""
        if path not in self._files:
            assert self.folder is not None
            file = (self.folder / unquote(path).lstrip("/")).resolve()
            if not file.is_relative_to(self.folder) or not file.is_file():
                return _MISSING
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            body = file.read_bytes()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            self._files[path] = f"{head}Cache-Control: max-age=86400\r\n\r\n".encode() + body
        return self._files[path]

    async def _tunnel(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytes, asked: bytes
    ) -> None:
        """Joins the browser to the real server, until either closes."""
        there_reader, there = await asyncio.open_connection(self.host, self.port)
        writer.write(said)
        there.write(asked)
        ways = [asyncio.create_task(_copy(reader, there)), asyncio.create_task(_copy(there_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            there.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


def _origin(url: str) -> tuple[str, str, int]:
    """(origin, host, port) of a URL. Raises ValueError for what is no http(s) URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: no http(s) URL")
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{parts.hostname}:{port}", parts.hostname, port
