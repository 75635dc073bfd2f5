"""Mutation testing: of small faults put into `offline_lm/losses/`, one at a time, how many do `tests/losses` notice?

    python analysis/benchmarks/mutants.py [json=true] [files=masks,td,...] [seconds=60] [goal=0.9]

Every operator, comparison, number, flag, method call, guard and returned value is changed or dropped (`changed`; types
and messages are not). A mutant runs the tests that import its file in a fork of one process that has torch imported,
with few hypothesis cases (profile `quick`) and at most ``seconds`` of CPU time: out of time counts as noticed.
Mutants that no test can notice stand in `mutants_equivalent.txt`, each judged by hand, with the reason: they are
counted apart, and told if a test notices one after all. All others that survive are printed.

mutmut 3 leaves out whatever is decorated, here the recurrence of the returns (`torch.no_grad`); cosmic-ray starts a
process, and imports torch, for every mutant.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import gc
import importlib.util
import io
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import _measure
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LOSSES, TESTS = ROOT / "offline_lm" / "losses", ROOT / "tests" / "losses"
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
OPTIONS = ["-x", "-q", "--tb=no", "--hypothesis-profile=quick", "--rootdir", str(ROOT)]
OPTIONS += ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]

COMPARE: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
OPERATOR: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
SWAPPED: dict[str, str] = dict([
    *(("min", "max"), ("max", "min"), ("amin", "amax"), ("amax", "amin"), ("minimum", "maximum"), ("sum", "mean")),
    *(("mean", "sum"), ("ones", "zeros"), ("ones_like", "zeros_like"), ("zeros_like", "ones_like"), ("any", "all")),
    *(("softmax", "log_softmax"), ("log_softmax", "softmax"), ("ceil", "floor"), ("lt", "le"), ("maximum", "minimum")),
])  # fmt: skip


class Mutant(NamedTuple):
    """A fault: `name` says where and what, and does not change with line numbers."""

    file: str
    name: str
    code: CodeType


def changed(node: ast.AST) -> Sequence[ast.AST]:
    """What may stand in the place of a node."""
    match node:
        case ast.Compare(left, [op], right):
            return [ast.Compare(left, [other()], right) for other in COMPARE[type(op)]]
        case ast.BinOp(left, op, right) if type(op) in OPERATOR:
            return [ast.BinOp(left, OPERATOR[type(op)](), right)]
        case ast.AugAssign(target, op, value) if type(op) in OPERATOR:
            return [ast.AugAssign(target, OPERATOR[type(op)](), value)]
        case ast.BoolOp(op, values):
            return [ast.BoolOp(OPERATOR[type(op)](), values)]
        case ast.UnaryOp(_, operand):
            return [operand]
        case ast.Constant(bool() as x):
            return [ast.Constant(not x)]
        case ast.Constant(int() | float() as x):
            return [ast.Constant(x + 1), ast.Constant(x - 1)]
        case ast.Constant(str() as x) if x in SWAPPED:
            return [ast.Constant(SWAPPED[x])]
        case ast.Name(x) if x in SWAPPED:
            return [ast.Name(SWAPPED[x], ast.Load())]
        case ast.Call(ast.Attribute(receiver, x) as function, arguments, keywords):
            renamed = ast.Attribute(receiver, SWAPPED.get(x, ""), ast.Load())
            swapped = [ast.Call(renamed, arguments, keywords)] if x in SWAPPED else []
            return swapped + ([] if _is_module(function.value) else [receiver])
        case ast.Call(ast.Name() as function, arguments, keywords):
            optional = [i for i, x in enumerate(arguments) if ast.unparse(x) in ("mask", "weight", "last", "bootstrap")]
            none = ast.Constant(None)
            return [ast.Call(function, [*arguments[:i], none, *arguments[i + 1 :]], keywords) for i in optional]
        case ast.If(ast.Name() | ast.Call() as test, body, other):
            return [ast.If(ast.UnaryOp(ast.Not(), test), body, other)]
        case ast.IfExp(ast.Name() | ast.Call() as test, body, other):
            return [ast.IfExp(test, other, body)]
        case ast.Return(ast.expr()):
            return [ast.Return(ast.Constant(None))]
        case ast.Raise() | ast.Expr(ast.Call()) | ast.Assign([ast.Subscript()]):
            return [ast.Pass()]
    return []


def _is_module(node: ast.expr) -> bool:
    return ast.unparse(node).split(".")[0] in ("torch", "math")


def places(node: ast.AST, where: str, statement: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST, str, int | None]]:
    """(function, statement, parent, field, index) of every node that may change."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for i, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if not isinstance(child, ast.AST) or isinstance(child, ast.Import | ast.ImportFrom | ast.JoinedStr):
                continue
            inner = f"{where}.{child.name}".strip(".") if isinstance(child, ast.FunctionDef | ast.ClassDef) else where
            at = child if isinstance(child, ast.stmt) else statement
            yield inner, at, node, field, i
            if not isinstance(child, ast.Raise):  # a guard goes as a whole: its message is for people
                yield from places(child, inner, at)


def mutants(file: Path) -> Iterator[Mutant]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    seen: Counter[str] = Counter()

    def mutant(where: str, what: str) -> Mutant:
        name = f"{file.stem}.{where} | {what}".replace("\n", " ")
        seen[name] += 1
        code = compile(ast.fix_missing_locations(copy.deepcopy(tree)), str(file), "exec")
        return Mutant(file.stem, name if seen[name] == 1 else f"{name} (place {seen[name]})", code)

    for where, statement, parent, field, i in places(tree, "", tree):
        holder: Any = parent if i is None else getattr(parent, field)
        old = getattr(parent, field) if i is None else holder[i]
        head = ast.unparse(statement).splitlines()[0] if not isinstance(statement, ast.FunctionDef) else "def"
        for new in changed(old):
            (setattr(parent, field, new) if i is None else holder.__setitem__(i, new))
            before, after = (ast.unparse(x).splitlines()[0] for x in (old, new))
            yield mutant(where, f"{head} | {before} -> {after}")
        (setattr(parent, field, old) if i is None else holder.__setitem__(i, old))
        if isinstance(old, ast.FunctionDef) and (decorators := old.decorator_list):
            for k, decorator in enumerate(decorators):
                if "no_grad" in ast.unparse(decorator):
                    old.decorator_list = decorators[:k] + decorators[k + 1 :]
                    yield mutant(where, "def | @torch.no_grad() -> ")
            old.decorator_list = decorators


def noticed(stem: str, mutant: Mutant | None, seconds: int) -> bool:
    """Whether a test fails, or the time is over, with the fault in place; without one it tries the tests themselves."""
    found = sorted(TESTS.glob("test_*.py"))
    tests = [str(test) for test in found if f"losses.{stem} import" in test.read_text(encoding="utf-8")]
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        _silence()
        if mutant:
            _put(mutant)
        os._exit(pytest.main([*OPTIONS, *tests]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"pytest ended with {status} on {mutant.name if mutant else 'what is not mutated'}")
    return status != 0


def _silence() -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)


def warm() -> None:
    """Everything that tests import, but the losses and the tests themselves: forks have it for nothing."""
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*OPTIONS, "--collect-only", str(TESTS)])
    # torch imports half of itself at the first call of these
    torch.testing.assert_close(torch.ones(1), torch.ones(1))
    torch.optim.SGD([torch.ones(1)], lr=1.0)
    for name in list(sys.modules):
        if name.startswith(("offline_lm.losses", "test_")):
            del sys.modules[name]
    gc.freeze()


def _put(mutant: Mutant) -> None:
    """Its module in place of the real one; one that cannot be imported is noticed by whoever does."""
    name = f"offline_lm.losses.{mutant.file}"
    package = importlib.import_module("offline_lm.losses")
    spec = importlib.util.find_spec(name)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(mutant.code, module.__dict__)
    except Exception:
        os._exit(1)
    setattr(package, mutant.file, module)


def equivalents() -> dict[str, str]:
    """Names of mutants that no test can notice, with the reasons: two lines each, the second indented."""
    lines = [line for line in EQUIVALENT.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(zip(lines[::2], map(str.strip, lines[1::2]), strict=True))


def main(argv: list[str]) -> None:
    every = sorted(file.stem for file in LOSSES.glob("[a-z]*.py"))
    given = _measure.arguments(argv, files=",".join(every), seconds="60", goal="0.9")
    if unknown := set(given["files"].split(",")) - set(every):
        raise SystemExit(f"no file {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    torch.set_num_threads(1)
    warm()
    known, rows, survivors, wrong, names = equivalents(), [], [], [], set()
    for stem in given["files"].split(","):
        if noticed(stem, None, int(given["seconds"])):
            raise SystemExit(f"the tests of {stem} fail without any fault, or take {given['seconds']} seconds")
        counts: Counter[str] = Counter()
        for mutant in mutants(LOSSES / f"{stem}.py"):
            names.add(mutant.name)
            dead = noticed(stem, mutant, int(given["seconds"]))
            counts["equivalent" if mutant.name in known else "killed" if dead else "survived"] += 1
            if not dead and mutant.name not in known:
                survivors.append(mutant.name)
                print(f"survived: {mutant.name}", file=sys.stderr, flush=True)
            elif dead and mutant.name in known:
                wrong.append(mutant.name)
        n = counts.total() - counts["equivalent"]
        rows.append({"file": stem, "mutants": counts.total(), **{k: counts[k] for k in ("killed", "survived")}})
        rows[-1] |= {"equivalent": counts["equivalent"], "share": counts["killed"] / max(n, 1)}
        print(rows[-1], file=sys.stderr, flush=True)
    done = given["files"].split(",")
    wrong += [name for name in known if name.split(".")[0] in done and name not in names]
    total, killed, alike = (sum(row[key] for row in rows) for key in ("mutants", "killed", "equivalent"))
    share, goal = killed / (total - alike), float(given["goal"])
    said = {"ours": share, "peer": goal, "ratio": share / goal, "goal": 1, "unit": "share of mutants killed"}
    said |= {"mutants": total, "killed": killed, "equivalent": alike, "share_of_all": killed / total}
    said |= {"survivors": survivors, "wrongly_equivalent": wrong}
    if given["json"] == "true":
        versions = _measure.versions("torch", "hypothesis", "pytest", **given)
        print(json.dumps({**said, "rows": rows, "versions": versions}))
        return
    for row in rows:
        print("  ".join(f"{key} {value:.3f}" if key == "share" else f"{key} {value}" for key, value in row.items()))
    print(f"\n{killed} of {total - alike} mutants killed: {share:.1%} (goal {goal:.0%}); {alike} others are equivalent")
    print(f"(judged one by one in {EQUIVALENT.name}): counted as survivors they make it {killed / total:.1%}")
    for name in wrong:
        print(f"listed as equivalent, but noticed or gone: {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
