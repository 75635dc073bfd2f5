"""Secrets out of episodes before they are hashed and stored.

Three things are taken for secrets: what a pattern finds (`default_patterns`), the whole value of a key named like
password, token or cookie, and what an action types into a password field (`offline_lm.store._typed`). Each becomes
``[redacted:KIND:n]``, numbered within the episode in the order found: equal secrets stay equal, so a goal still matches
what was typed. (The hash of the whole record, ``provenance.sha256``, stays.) A secret found once is then replaced
wherever else the episode holds it as a whole word: from 8 characters if a pattern found it, from 4 if it was typed into
a password field; a shorter one only in the step that typed it.

Token ids of a redacted text would give it away: they are dropped (flag ``tokens_dropped_by_redaction``). An episode
that anything was taken out of has the flag ``redacted``.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

import orjson
import yaml

from offline_lm import paths
from offline_lm.store import _typed
from offline_lm.store._patterns import PLACEHOLDER, Patterns
from offline_lm.store._prefilter import Prefilter, re2_escape
from offline_lm.store._vault import ANY_KEYS, LEAST, Change, Vault, utf8
from offline_lm.store.rows import REDACTED
from offline_lm.types import Episode, Rejected, Step

T = TypeVar("T")

FLAG = "tokens_dropped_by_redaction"
_DEEPEST = 300
"""Values nested deeper than the store takes (orjson: 254) are left: they reach quarantine without content."""

_KEY = re.compile(
    r"""(?x)
    (?! (?i:.*\b|.*_) (?i:eos|bos|pad|unk|sep|cls|mask|stop|special|start|end|max|min|num|n|per)[_-]?(?i:token) $ )
    (?: (?:.*[_\-.\s:])? (?i: passw(?:or)?d\d? | passwort | pwd | passphrase | passcode | secrets? | token | jwt
        | authorization | (?:set-)?cookies?2? | (?:api|access|private|secret|auth)[_-]?key | credentials? | bearer )
    | .*[a-z](?: Password | Passwd | Token | Secret | ApiKey | Cookies? | PrivateKey | AccessKey ) )
    """
)
_KEY_WORDS = (
    *("passw", "pwd", "passphrase", "passcode", "secret", "token", "authorization", "cookie", "apikey", "api_key"),
    *("api-key", "access_key", "accesskey", "access-key", "private_key", "privatekey", "private-key", "auth_key"),
    *("authkey", "auth-key", "credential", "jwt", "bearer"),
)
_NAMED = (
    r"(?:passw(?:or)?d\d?|passwort|pwd|passphrase|passcode|passwd|secrets?|token|jwt|authorization|cookies?2?"
    r"|(?:api|access|private|secret|auth)[_-]?key|credentials?|bearer)\"\s*:"
)
"""RE2: what ends every key, as JSON, that `_KEY` takes for a secret's."""
_TOKENS_KEY = re.compile(r"(?i).*(?:token_?ids|prompt_ids|completion_ids|input_ids|response_ids|tokens|logprobs)")
_MENTION = re.compile(
    r"(?i)passw|passcode|passphrase|pwd|secret|token|cookie|authorization|bearer|credential"
    r"|(?:api|access|private)[ _-]?key"
)
_LOGIN = re.compile(_MENTION.pattern + r"|log[ _-]?in|sign[ _-]?in|\btyped?[\s(\[]|\bfill|\binput_text|send_keys")

_SKIPPED = {
    *("source", "sha256", "steps", "screenshot", "context_hash", "adapter_version", "observation_kind", "tokenizer_id"),
    *("ts_start", "ts_end", "prompt_token_ids", "response_token_ids", "response_logprobs", "started_at"),
}
_PAGE = {"observation", "messages", "url", "title", "observation_error"}


def default_patterns() -> dict[str, str]:
    """Kind -> regular expression, as in conf/redact/default.yaml."""
    return yaml.safe_load((paths.CONF / "redact" / "default.yaml").read_text("utf-8"))["patterns"]


class Redactor:
    """Takes secrets out of texts, episodes and rejected records, and counts them by kind in ``counts``.

    Args:
        patterns: kind -> regular expression, as `offline_lm.store._patterns.Patterns` reads them.
            Without any pattern nothing is redacted, typed passwords neither.

    Raises:
        UserError: an expression that does not compile or can match nothing at all, a kind that is no name.
    """

    def __init__(self, patterns: Mapping[str, str]) -> None:
        self.counts: Counter[str] = Counter()
        self._off = not patterns
        self._patterns = Patterns(patterns, (*_KEY_WORDS, *_typed.WORDS))
        headers = f'"(?:{"|".join(map(re2_escape, sorted(_HEADERS)))})"'
        self.prefilter = Prefilter(patterns.values(), (*_typed.WORDS, "[redacted:"), (_NAMED, headers))

    @classmethod
    def default(cls) -> Redactor:
        return cls(default_patterns())

    def text(self, text: str) -> str:
        """`text` with what the patterns find replaced; numbered within this text."""
        if self._off:
            return text
        words = self._patterns.words(text)
        if not self._patterns.may_match(text, words):
            return text
        return self._search(words, Vault(self.counts, [text]))(text)

    def episode(self, episode: Episode) -> Episode:
        """`episode` without its secrets; the same object if it holds none."""
        return self.episodes([episode])[0]

    def episodes(self, episodes: Sequence[Episode]) -> list[Episode]:
        """`episode` of each, many times faster than one by one."""
        if self._off:
            return list(episodes)
        parts = [part for episode in episodes for part in (episode, *episode.steps)]
        suspects = iter(self.prefilter([_as_text(part) for part in parts]))
        return [self._episode(one, [next(suspects) for _ in range(1 + len(one.steps))]) for one in episodes]

    def _episode(self, episode: Episode, suspects: list[bool]) -> Episode:
        """`suspects`: whether the episode beside its steps, and each step, may hold a secret or a placeholder."""
        if not any(suspects):
            return episode
        parts = zip((episode, *episode.steps), suspects, strict=True)
        pieces = [_texts(part) if suspect else [] for part, suspect in parts]
        joined = ["\n".join(piece) for piece in pieces]
        words = [self._patterns.words(text) for text in joined]
        named = [not some.isdisjoint(_KEY_WORDS) for some in words]
        suspect = [
            has_name or self._patterns.may_match(text, some)
            for has_name, text, some in zip(named, joined, words, strict=True)
        ]
        may_type = any(not some.isdisjoint(_typed.WORDS) for some in words)
        if not (may_type or any(suspect)):
            return episode
        vault = Vault(self.counts, chain.from_iterable(pieces))
        typed = list(_typed.passwords(episode)) if may_type else []
        for _, literal in typed:
            vault.of(literal, "typed_password")

        def clean(part: T, i: int) -> T:
            return _rewrite(part, self._search(words[i], vault), vault.hide if named[i] else None)

        redacted = clean(episode, 0) if suspect[0] else episode
        steps = [clean(step, i) if suspect[i] else step for i, step in enumerate(episode.steps, 1)]
        if any(new is not old for new, old in zip(steps, episode.steps, strict=True)):
            redacted = replace(redacted, steps=tuple(steps))
        if everywhere := vault.everywhere():
            redacted = _everywhere(redacted, everywhere)
        redacted = _in_step(redacted, [(i, text) for i, text in typed if len(text) < LEAST["typed_password"]], vault)
        return episode if redacted is episode else _without_traces(episode, redacted)

    def _search(self, words: frozenset[str], vault: Vault) -> Change:
        return self._patterns.replacer(words, lambda found, kind: vault.of(found, kind, count=True))

    def rejected(self, rejected: Rejected) -> Rejected:
        """`rejected` without secrets.

        Its excerpt may be cut anywhere, so where it so much as mentions a password, token or login, all values after
        that are masked; in the message, all that is quoted after it.
        """
        if self._off:
            return rejected
        message, excerpt = self.text(rejected.message), rejected.excerpt
        if mention := _MENTION.search(message):
            at = mention.end()
            message = message[:at] + re.sub(r"'[^']*(?:'|\Z)|\"[^\"]*(?:\"|\Z)", self._mask, message[at:])
        if excerpt is not None:
            excerpt = self.text(excerpt)
            if mention := _LOGIN.search(excerpt):
                excerpt = excerpt[: mention.end()] + self._values(excerpt[mention.end() :])
        return replace(rejected, uri=self.text(rejected.uri), message=message, excerpt=excerpt)

    def _mask(self, match: re.Match[str]) -> str:
        if not re.search(r"\w", PLACEHOLDER.sub("", match[0])):
            return match[0]
        self.counts["masked"] += 1
        return "[redacted]"

    def _values(self, tail: str) -> str:
        """All but placeholders, punctuation and the keys of objects, masked."""
        kept = r"(\[redacted(?::[\w.-]+:\d+)?\]|\\?[\"'][A-Za-z_]\w{0,40}\\?[\"']\s*:)"
        parts = re.split(kept, tail)
        for i in range(0, len(parts), 2):
            parts[i] = re.sub(r"\w(?:.*\w)?", self._mask, parts[i], flags=re.DOTALL)
        return "".join(parts)


# --- walking an episode -------------------------------------------------------------------------------------


def _as_text(part: Episode | Step) -> str:
    """The texts of a part for `Prefilter`; what is no text by itself as its JSON."""
    texts = []
    for value in _values(type(part))(part):
        if type(value) is str:
            texts.append(value)
        elif value and type(value) not in _NO_TEXT:
            try:
                texts.append(orjson.dumps(value, option=ANY_KEYS).decode())
            except (TypeError, ValueError):  # JSON cannot say it (a huge number, a lone surrogate): look closely
                return _SUSPECT
    return "\n".join(texts)


_SUSPECT = "\\u"
"""A text that `Prefilter` always finds."""


def _texts(value: Any) -> list[str]:
    """Every text that a step holds, or an episode beside its steps, names of keys included."""
    texts: list[str] = []
    _collect(value, texts, 0)
    return texts


def _collect(value: Any, texts: list[str], depth: int) -> None:
    if type(value) is str:
        texts.append(value)
        if "\\" in value and "\\u00" in value:  # JSON may write any letter so
            texts.append(re.sub(r"\\u00([0-7][0-9a-fA-F])", lambda m: chr(int(m[1], 16)), value))
    elif value is None or type(value) in _NO_TEXT or depth > _DEEPEST:
        return
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                texts.append(key)
            _collect(item, texts, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, texts, depth + 1)
    elif is_dataclass(value):
        for name in _names(type(value)):
            _collect(getattr(value, name), texts, depth + 1)


_NO_TEXT = (bool, int, float)


@lru_cache
def _names(kind: type) -> tuple[str, ...]:
    """Fields that may hold text; not an episode's steps."""
    return tuple(field.name for field in fields(kind) if field.name not in _SKIPPED)


@lru_cache
def _values(kind: type) -> attrgetter[tuple[Any, ...]]:
    return attrgetter(*_names(kind))


def _rewrite(value: T, change: Change, named: Callable[[Any], Any] | None, depth: int = 0) -> T:
    """`value` with `change` on each of its texts and `named` on the values of keys named like a secret; the same object
    where nothing changes."""
    if depth > _DEEPEST:
        return value
    if type(value) is str:
        return change(value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return _mapping(value, change, named, depth)  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        items = [_rewrite(item, change, named, depth + 1) for item in value]
        if named is not None and len(items) == 2 and type(value[0]) is str and type(value[1]) is str:
            items[1] = named(items[1]) if _is_header(value[0]) else items[1]  # ["Cookie", "a=b"]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else type(value)(items)  # type: ignore[call-arg,return-value]
    if is_dataclass(value) and not isinstance(value, type):
        changed = {}
        for name in _names(type(value)):
            old = getattr(value, name)
            if old is not None and type(old) not in _NO_TEXT:
                inner = _json_text if name == "messages" and isinstance(value, Step) else _rewrite
                if (new := inner(old, change, named, depth + 1)) is not old and new != old:
                    changed[name] = new
        return replace(value, **changed) if changed else value
    return value


def _everywhere(episode: Episode, change: Change) -> Episode:
    """`episode` with `change` on its texts and those of its steps."""
    changed = _rewrite(episode, change, None)
    steps = tuple([_rewrite(step, change, None) for step in episode.steps])
    same = all(new is old for new, old in zip(steps, episode.steps, strict=True))
    return changed if same else replace(changed, steps=steps)


def _mapping(value: dict[Any, Any], change: Change, named: Callable[[Any], Any] | None, depth: int) -> dict[Any, Any]:
    result, same = {}, True
    header = named is not None and "value" in value
    header = header and any(_is_header(value.get(key)) for key in ("name", "key", "header"))
    token = "logprob" in value or "token_id" in value  # a token of a language model
    for key, old in value.items():
        new_key = change(key) if type(key) is str else key
        secret = type(key) is str and (
            (_is_secret(key) and not (token and key == "token")) or (header and key == "value")
        )
        new = named(old) if secret and named is not None else _rewrite(old, change, named, depth + 1)
        if new is old or new == old:
            new = old
        same = same and new is old and new_key == key
        result[new_key] = new
    return value if same else result


@lru_cache(maxsize=10_000)
def _is_secret(key: str) -> bool:
    return len(key) < 100 and _KEY.fullmatch(key) is not None


def _is_header(name: Any) -> bool:
    return isinstance(name, str) and name.lower() in _HEADERS


_HEADERS = {"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "x-auth-token", "api-key"}


def _json_text(text: str, change: Change, named: Callable[[Any], Any] | None, depth: int) -> str:
    """JSON, redacted within its strings; text that is no JSON is redacted as it stands."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return change(text)
    new = _rewrite(value, change, named, depth)
    return text if new is value else orjson.dumps(new).decode()


def _in_step(episode: Episode, typed: list[tuple[int, str]], vault: Vault) -> Episode:
    """Replaces passwords too short to be looked for everywhere: quoted in the step that typed them."""
    steps = list(episode.steps)
    for i, literal in typed:
        pattern = re.compile(rf"(?<![^\s\"'\[(\\:;=]){re.escape(literal)}(?![^\s\"'\]),\\;])")

        def change(text: str, pattern: re.Pattern[str] = pattern, literal: str = literal) -> str:
            return pattern.sub(lambda _: vault.of(literal, "typed_password", count=True), text)

        step = steps[i]
        page = {name: getattr(step, name) for name in _PAGE}
        steps[i] = replace(_rewrite(step, change, None), **page)
    return replace(episode, steps=tuple(steps)) if steps != list(episode.steps) else episode


def _without_traces(before: Episode, after: Episode) -> Episode:
    """Drops token ids that would decode to what was redacted, and hashes of it; keeps names unique."""
    first = next((i for i, (a, b) in enumerate(zip(before.steps, after.steps, strict=True)) if a is not b), None)
    if before.goal != after.goal or first is None:
        first = 0
    steps, dropped = list(after.steps), False
    digest = hashlib.sha256()
    for i, step in enumerate(after.steps):
        changes: dict[str, Any] = {}
        digest.update((step.messages or "").encode("utf-8", "replace"))
        if i >= first and step.context_hash is not None:  # as `offline_lm.logs._chat` makes it
            changes["context_hash"] = digest.hexdigest() if step.messages is not None else None
        digest.update(orjson.dumps([step.response], default=str) if utf8(step.response or "") else b"?")
        if i >= first and step.prompt_token_ids is not None:  # the prompt holds the steps before
            changes["prompt_token_ids"] = None
        if step is not before.steps[i] and step.response_token_ids is not None:
            changes["response_token_ids"] = changes["response_logprobs"] = None
        if i >= first and step.extra and (extra := _untokened(step.extra)) != step.extra:
            changes["extra"] = extra
        dropped = dropped or bool(changes.keys() - {"context_hash"})
        steps[i] = replace(step, **changes) if changes else step
    extra = _untokened(after.extra) if after.extra else after.extra
    dropped = dropped or extra != after.extra
    new_flags = (REDACTED, FLAG) if dropped else (REDACTED,)
    flags = tuple(dict.fromkeys((*after.quality_flags, *new_flags)))
    native_id = after.native_id
    if native_id != before.native_id and after.sha256:  # two names that differed in the secret alone
        native_id = f"{native_id}#{after.sha256[:12]}"
    return replace(after, steps=tuple(steps), extra=extra, quality_flags=flags, native_id=native_id)


def _untokened(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        return value
    if isinstance(value, dict):
        return {
            key: _untokened(item, depth + 1)
            for key, item in value.items()
            if not (isinstance(item, list | dict) and isinstance(key, str) and _TOKENS_KEY.fullmatch(key))
        }
    return [_untokened(item, depth + 1) for item in value] if isinstance(value, list) else value
