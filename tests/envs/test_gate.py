"""The proxy that is a browser's only way out: asked in raw bytes, for browsers tidy paths up before they ask."""

import asyncio
from urllib.parse import urlsplit

import pytest

from offline_lm.envs.gate import Gate

ORIGIN = "http://tasks.test"


def answers(folder, *targets):
    """What the gate to a folder says to each target: status line and body."""

    async def ask(port, target):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {target} HTTP/1.1\r\nHost: tasks.test\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.write_eof()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return head.split(b"\r\n")[0].decode(), body

    async def body():
        gate = Gate(ORIGIN, folder)
        port = urlsplit(await gate.open()).port
        try:
            async with asyncio.timeout(20):
                return [await ask(port, target) for target in targets]
        finally:
            await gate.close()

    return asyncio.run(body())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "pages-beside").mkdir()
    (tmp_path / "pages-beside" / "secret.txt").write_text("secret")
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "a page.html").write_text("<p>hello")
    (pages / "link.html").symlink_to(tmp_path / "secret.txt")
    return pages


def test_a_page_of_the_folder_is_served(folder):
    ((status, body),) = answers(folder, f"{ORIGIN}/a%20page.html")
    assert (status, body) == ("HTTP/1.1 200 OK", b"<p>hello")


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/%2e%2e/secret.txt", "/a/../../secret.txt", "/..%2fsecret.txt", "/%2e%2e%2fsecret.txt",
        "/../pages-beside/secret.txt", "/link.html", "//etc/passwd", "/%2fetc/passwd", "/.", "/",
    ],
)  # fmt: skip
def test_nothing_outside_the_folder_is(folder, path):
    ((status, body),) = answers(folder, ORIGIN + path)
    assert status.split()[1] in ("404", "403")
    assert b"secret" not in body
    assert b"root:" not in body


@pytest.mark.parametrize("target", ["http://elsewhere.test/x", "http://tasks.test:81/x", "http://tasks.test.evil/x"])
def test_no_other_origin_is_reached(folder, target):
    ((status, _),) = answers(folder, target)
    assert status.split()[1] == "403"
