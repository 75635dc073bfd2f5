"""How every command starts: Hydra configuration, exit codes, and which code a configuration may name.

Exit 0: done. 2: a user's mistake, told in one line. 1: a fault of ours, with its traceback. 130: interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import hydra.utils
import orjson
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from offline_lm import paths
from offline_lm.errors import UserError

Body = Callable[[DictConfig], Mapping[str, Any] | None]

_VERBATIM = {
    *("path", "labels", "store", "input", "output", "run_dir", "data.store", "model.path", "run", "overrides"),
    *("where", "sql"),
}
"""Keys whose value is a file name or SQL: taken as written, commas and brackets included."""

_targets: ContextVar[frozenset[str] | None] = ContextVar("targets", default=None)


def run(config_name: str, body: Body, argv: Sequence[str] | None = None) -> int:
    """Composes ``conf/CONFIG_NAME.yaml`` with ``argv``, calls ``body``, returns the exit code.

    ``body`` gets the configuration, resolved and without missing values. With ``json=true`` what it returns
    is printed last, as one JSON object on a line. With ``--multirun`` it is called for every combination of
    ``key=a,b``, and the object is ``{"runs": [...]}``.
    """
    try:
        _run(config_name, body, sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def instantiate(cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """`hydra.utils.instantiate`, for a ``_target_`` that stands in our conf/ or the user's --config-dir.

    Raises:
        UserError: any other ``_target_``, at whatever depth; a value that the target refuses with a ValueError
            (whose message may begin with ``name=value``), or an argument that it does not take.
    """
    _check_targets(cfg)
    try:
        return hydra.utils.instantiate(cfg, *args, **kwargs)
    except InstantiationException as error:
        refused = error.__cause__
        if not isinstance(refused, ValueError | TypeError):
            raise
        found = re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)
        key, reason = found[1] if found else "", _line(refused)
        separator = "" if not key else "." if re.match(r"\w+=", reason) else ": "
        raise UserError(f"{key}{separator}{reason}") from error


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A file to write beside ``output``, then renamed: what fails or is killed leaves the old file as it was.

    Raises:
        UserError: it cannot be written.
    """
    beside = output.with_name(f".{os.getpid()}.{output.name}")
    try:
        yield beside
        beside.replace(output)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """``cfg`` as plain dicts and lists, to be saved."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def composed(config_name: str, *overrides: str) -> DictConfig:
    """The configuration that a command would have, started with these ``key=value``.

    Raises:
        UserError: it would refuse them.
    """
    with _mistakes(config_name):
        return _compose(config_name, [_quoted(arg) for arg in overrides], [])


def _run(config_name: str, body: Body, argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-cd", "--config-dir", action="append", default=[])
    parser.add_argument("-m", "--multirun", action="store_true")
    options, rest = parser.parse_known_args(list(argv))
    if options.help:
        print(_help(config_name))
        return
    dirs = [Path(folder).absolute() for folder in options.config_dir]
    for folder in dirs:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder}: no such folder")
    if bad := next((arg for arg in rest if arg.startswith("-") or ("=" not in arg and not arg.startswith("~"))), None):
        raise UserError(f"`{bad}` is not key=value; see --help")

    allowed = frozenset(_targets_in(paths.CONF)).union(*map(_targets_in, dirs))
    token = _targets.set(allowed)
    try:
        jobs = [list(job) for job in _jobs([_quoted(arg) for arg in rest], options.multirun)]
        results = []
        for job in jobs:
            with _mistakes(config_name):
                cfg = _compose(config_name, job, dirs)
            _check_targets(cfg)
            results.append((cfg, body(cfg)))
    finally:
        _targets.reset(token)
    cfg, result = results[-1]
    if cfg.get("json"):
        printed = {"runs": [result for _, result in results]} if options.multirun else result
        print(orjson.dumps(printed, default=str, option=orjson.OPT_SERIALIZE_NUMPY).decode())


def _compose(config_name: str, overrides: list[str], dirs: Sequence[Path]) -> DictConfig:
    _register_resolvers()
    if dirs:
        listed = ",".join(f'"file://{folder}"' for folder in dirs)
        overrides = [*overrides, f"hydra.searchpath=[{listed}]"]
    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        cfg = compose(config_name, overrides)
    OmegaConf.resolve(cfg)
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{', '.join(f'{key}=' for key in missing)} must be given; see --help")
    return cfg


def _register_resolvers() -> None:
    """``${default_store:}`` is ours; ``${oc.env:X}`` is refused: a run saves what it holds, secrets too."""

    def refuse(name: str = "", *_: Any) -> str:
        raise UserError(
            f"the configuration reads ${{oc.env:{name}}}, and would be saved with its value: write the value"
        )

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    OmegaConf.register_new_resolver(
        "default_store", lambda: os.environ.get("OFFLINE_LM_STORE") or "store", replace=True
    )


def _jobs(overrides: list[str], multirun: bool) -> Iterator[tuple[str, ...]]:
    """Each job's overrides: one job, or with ``--multirun`` every combination of ``key=a,b``."""
    parser = OverridesParser.create()
    choices: list[list[str]] = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise UserError(f"`{text}` cannot be read ({_line(error)}): quote the value, as in key='a, b'") from error
        _check_override(override)
        if not override.is_sweep_override():
            choices.append([text])
        elif multirun:
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise UserError(f"`{text}` names several values: quote it, or run each with --multirun")
    return itertools.product(*choices)


def _check_override(override: Override) -> None:
    if "_target_" in (override.input_line or ""):
        raise UserError(
            f"`{override.input_line}`: _target_ cannot be set on the command line; "
            "put it into a file under --config-dir"
        )


@contextmanager
def _mistakes(config_name: str) -> Iterator[None]:
    """What Hydra and OmegaConf say about a configuration, as one line that names the mend."""
    try:
        yield
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if not group or not error.options:
            raise UserError(_line(error)) from error
        raise UserError(f"no {group}={option}; there are {', '.join(sorted(error.options))}") from error
    except (HydraException, OmegaConfBaseException) as error:
        if refused := _cause(error, UserError):
            raise refused from error
        raise UserError(_explain(error, config_name)) from error


def _explain(error: Exception, config_name: str) -> str:
    text = str(error)
    if found := re.match(r"Could not override '([^']+)'", text):
        key = found[1]
        cause = error.__cause__
        if cause is not None and "is not in struct" not in str(cause) and "not in" not in str(cause):
            return f"{key}: {_line(cause)}"
        known = sorted(_keys(config_name))
        close = difflib.get_close_matches(key, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"keys: {', '.join(known)}"
        return f"no key `{key}` in {config_name}; {hint}"
    if found := re.match(r"Could not override '?([\w./@]+)'?\.?\s*No match in the defaults list", text):
        return f"no group `{found[1]}` in {config_name}"
    return _line(error)


def _keys(config_name: str, *groups: str) -> Iterator[str]:
    """Dotted keys of the configuration as it stands, or with other ``groups`` than its defaults (``model=tiny``)."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        cfg = compose(config_name, list(groups))
    yield from walk(OmegaConf.to_container(cfg, resolve=False), "")


def _line(error: BaseException) -> str:
    """The message of ``error`` without OmegaConf's stack of keys, on one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not re.match(r"(full_key|object_type|reference_type|See https)\b", line)]
    return "; ".join(kept) or type(error).__name__


def _cause(error: BaseException | None, kind: type[UserError]) -> UserError | None:
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def _quoted(arg: str) -> str:
    key, equals, value = arg.partition("=")
    if key.lstrip("+") not in _VERBATIM or not value or value == "null" or value[0] in "\"'[":
        return arg
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'{key}{equals}"{escaped}"'


def _targets_in(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.yaml")):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
        yield from (target for _, target in _find_targets(content))


def _find_targets(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of every ``_target_`` in nested dicts and lists."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                yield f"{path}_target_", str(value)
            else:
                yield from _find_targets(value, f"{path}{key}.")
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _find_targets(value, f"{path}{i}.")


def _check_targets(cfg: Any) -> None:
    content = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig | ListConfig) else cfg
    allowed = _targets.get()
    if allowed is None:
        allowed = frozenset(_targets_in(paths.CONF))
    for key, target in _find_targets(content):
        if target not in allowed:
            raise UserError(f"{key}={target} stands in no file of conf/ or --config-dir, so it is not run")


def _help(config_name: str) -> str:
    """The comment at the head of the YAML, its keys, and the options of each group."""
    file = paths.CONF / f"{config_name}.yaml"
    lines = file.read_text(encoding="utf-8").splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    body = "\n".join(lines[len(head) :]).strip()
    used = [
        (group.name, sorted(option.stem for option in group.glob("*.yaml")))
        for group in sorted(paths.CONF.iterdir())
        if group.is_dir() and re.search(rf"^\s*- (?:optional )?(?:override )?/?{group.name}\b", body, re.MULTILINE)
    ]
    groups = "".join(f"\n  {name}: {', '.join(options)}" for name, options in used)
    return "\n".join(
        [
            *(line.removeprefix("#").removeprefix(" ") for line in head),
            "",
            f"Keys, with their defaults ({config_name}.yaml):",
            "",
            *(f"  {line}" for line in body.splitlines()),
            *(["", f"Groups, set by GROUP=OPTION:{groups}"] if groups else []),
            "",
            "Options: --help, --config-dir FOLDER (more yaml), --multirun (every combination of key=a,b)",
        ]
    )
