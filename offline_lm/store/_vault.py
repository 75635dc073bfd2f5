"""The secrets of one episode, their placeholders, and every form in which one may stand elsewhere in it."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import quote

import orjson

from offline_lm.store import _typed
from offline_lm.store._patterns import PLACEHOLDER

Change = Callable[[str], str]

LEAST = {"typed_password": 4}
"""Characters from which a secret of a kind is replaced wherever it stands."""
_LEAST_OF_PATTERN = 8
ANY_KEYS = orjson.OPT_NON_STR_KEYS


class Vault:
    """The secrets of one episode and their placeholders."""

    def __init__(self, counts: Counter[str], texts: Iterable[str]) -> None:
        self._counts = counts
        self._of: dict[str, tuple[str, str]] = {}
        self._last: Counter[str] = Counter()
        for text in texts:  # a log may hold placeholders already: theirs stay theirs
            if "[redacted:" in text:
                for kind, number in PLACEHOLDER.findall(text):
                    self._last[kind] = max(self._last[kind], int(number[:9]))

    def of(self, secret: str, kind: str, *, count: bool = False) -> str:
        if secret not in self._of:
            self._last[kind] += 1
            self._of[secret] = kind, f"[redacted:{kind}:{self._last[kind]}]"
        kind, placeholder = self._of[secret]
        self._counts[kind] += count
        return placeholder

    def hide(self, value: Any) -> Any:
        """The placeholder of a value whose key is named like a secret; null and truth values hold none."""
        if value is None or type(value) is bool or value in ("", [], {}):
            return value
        text = value if isinstance(value, str) else _as_text(value)
        return value if not re.search(r"\w", PLACEHOLDER.sub("", text)) else self.of(text, "named", count=True)

    def everywhere(self) -> Change | None:
        """Replaces every secret that is long enough wherever it stands as a whole word, escaped or not."""
        forms: dict[str, tuple[str, str]] = {}
        for secret, (kind, placeholder) in list(self._of.items()):
            for part in (secret, *_parts(secret)):
                if len(part) >= LEAST.get(kind, _LEAST_OF_PATTERN) and not _typed.is_word(part):
                    escaped = orjson.dumps(part, default=str).decode("utf-8", "replace")[1:-1] if utf8(part) else part
                    for form in (part, escaped, html.escape(part), *_quoted(part)):
                        forms.setdefault(form, (kind, placeholder))
        if not forms:
            return None
        longest = sorted(forms, key=lambda form: (-len(form), form))
        bounds = [(r"(?<!\w)" * _edge(f[0])) + re.escape(f) + (r"(?!\w)" * _edge(f[-1])) for f in longest]
        # Placeholders first: a secret like "password" must not be found in one.
        pattern = re.compile("|".join([PLACEHOLDER.pattern.replace("(", "(?:"), *bounds]))

        def put(match: re.Match[str]) -> str:
            if match[0] not in forms:
                return match[0]
            kind, placeholder = forms[match[0]]
            self._counts[kind] += 1
            return placeholder

        return lambda text: pattern.sub(put, text) if any(form in text for form in forms) else text


def _edge(character: str) -> bool:
    return character.isalnum() or character == "_"


def utf8(text: str) -> bool:
    """Whether `text` has no lone surrogate."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _quoted(text: str) -> tuple[str, ...]:
    return (quote(text, safe=""), quote(text, safe="").replace("%20", "+")) if utf8(text) else ()


def _parts(secret: str) -> Iterator[str]:
    """The values within a header of cookies, if they look random enough to be a secret by themselves."""
    if ";" in secret or "=" in secret:
        for part in re.split(r"[;,\s=&\"]+", secret):
            if len(part) >= 12 and re.search(r"\d", part):
                yield part


def _as_text(value: Any) -> str:
    try:
        return orjson.dumps(value, default=str, option=ANY_KEYS).decode()
    except TypeError:  # an integer beyond 64 bits, which no JSON text of ours holds
        return repr(value)
