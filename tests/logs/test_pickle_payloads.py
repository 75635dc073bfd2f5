"""The reader of pickles: what it refuses, and that no payload runs.

Each payload would create a file named by the variable MARKER of the environment. Many of them are run by Python's own
`pickle` in another process, which proves that they would.
"""

import gzip
import os
import pickle
import struct
import subprocess
import sys

import pytest

from offline_lm.logs import _pickle
from offline_lm.logs._pickle import load
from offline_lm.logs._records import Bad

CODE = "open(__import__('os').environ['MARKER'],'w').close()"
SHELL = 'touch "$MARKER"'


def text(value):
    """The opcode of a string, for any length."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module, name):
    return text(module) + text(name) + b"\x93"


def called(module, name, *args):
    """The opcodes of a call with strings; an argument of bytes is opcodes itself."""
    given = b"".join(arg if isinstance(arg, bytes) else text(arg) for arg in args)
    return named(module, name) + b"(" + given + b"tR"


def whole(opcodes):
    return b"\x80\x04" + opcodes + b"."


SYSTEM = called("os", "system", SHELL)
EXEC = called("builtins", "exec", CODE)
EMPTY_DICT, EMPTY_TUPLE, NONE = b"}", b")", b"N"
CODE_OBJECT = called("builtins", "compile", CODE, "x", "exec")
ARGV = b"](" + text("sh") + text("-c") + text(SHELL) + b"e"
BUILTINS = called("importlib", "import_module", "builtins")

RUNS = {
    "os.system": whole(SYSTEM),
    "posix.system": whole(called("posix", "system", SHELL)),
    "os.popen": whole(called("os", "popen", SHELL)),
    "os.execvp by fork": whole(called("os", "spawnlp", b"K\x00", "sh", "sh", "-c", SHELL)),
    "subprocess.Popen": whole(called("subprocess", "Popen", ARGV)),
    "subprocess.call": whole(called("subprocess", "call", ARGV)),
    "subprocess.getoutput": whole(called("subprocess", "getoutput", SHELL)),
    "eval": whole(called("builtins", "eval", CODE)),
    "exec": whole(EXEC),
    "exec of __builtin__": b"c__builtin__\nexec\n(V" + CODE.encode() + b"\ntR.",
    "protocol 0 global": b"cos\nsystem\n(V" + SHELL.encode() + b"\ntR.",
    "protocol 0 string": b"cos\nsystem\n(S'touch \"$MARKER\"'\ntR.",
    "protocol 1": b"cos\nsystem\nq\x00(X" + struct.pack("<I", len(SHELL)) + SHELL.encode() + b"tR.",
    "protocol 2": b"\x80\x02cos\nsystem\n" + text(SHELL) + b"\x85R.",
    "protocol 5": b"\x80\x05" + SYSTEM + b".",
    "INST": b"(V" + SHELL.encode() + b"\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nV" + SHELL.encode() + b"\no.",
    "INST of a class": b"((lVsh\naV-c\naV" + SHELL.encode() + b"\naisubprocess\nPopen\n.",
    "NEWOBJ of a class that runs": whole(
        called("builtins", "type", "T", b"(" + named("builtins", "object") + b"t",
               b"}" + text("__new__") + called("builtins", "eval", f"lambda *_, **__: {CODE}")
               + b"s") + EMPTY_TUPLE + b"\x81"
    ),
    "NEWOBJ_EX": whole(
        called("builtins", "type", "T", b"(" + named("builtins", "object") + b"t",
               b"}" + text("__new__") + called("builtins", "eval", f"lambda *_, **__: {CODE}")
               + b"s") + EMPTY_TUPLE + EMPTY_DICT + b"\x92"
    ),
    "BUILD of __setstate__": whole(
        called("types", "SimpleNamespace") + b"}" + text("__setstate__") + named("os", "system") + b"sb"
        + text(SHELL) + b"b"
    ),
    "BUILD of slots on a module": whole(
        called("importlib", "import_module", "os") + b"(N}" + text("fsencode") + named("os", "system")
        + b"stb0" + called("os", "fsencode", SHELL)
    ),
    "functools.partial": whole(called("functools", "partial", named("os", "system"), SHELL) + EMPTY_TUPLE + b"R"),
    "functools.reduce": whole(called("functools", "reduce", named("builtins", "exec"), b"(" + text(CODE) + b"}t")),
    "getattr chain": whole(called("builtins", "getattr", BUILTINS, "exec") + text(CODE) + b"\x85R"),
    "operator.attrgetter": whole(
        called("operator", "attrgetter", "system") + called("importlib", "import_module", "os") + b"\x85R"
        + text(SHELL) + b"\x85R"
    ),
    "operator.methodcaller": whole(
        called("operator", "methodcaller", "system", SHELL) + called("importlib", "import_module", "os") + b"\x85R"
    ),
    "a dotted name": whole(called("importlib", "import_module", "os") + b"0" + called("pathlib", "os.system", SHELL)),
    "builtins.map in a list": whole(
        named("builtins", "list") + called("builtins", "map", named("builtins", "exec"), b"]" + text(CODE) + b"a")
        + b"\x85R"
    ),
    "types.FunctionType": whole(called("types", "FunctionType", CODE_OBJECT, EMPTY_DICT) + EMPTY_TUPLE + b"R"),
    "types.CodeType through eval": whole(called("builtins", "eval", CODE_OBJECT)),
    "runpy": whole(called("runpy", "_run_code", CODE_OBJECT, EMPTY_DICT)),
    "timeit": whole(called("timeit", "timeit", CODE, "pass", named("time", "time"), b"K\x01")),
    "code.InteractiveInterpreter": whole(
        called("builtins", "getattr", called("code", "InteractiveInterpreter"), "runcode") + CODE_OBJECT + b"\x85R"
    ),
    "cProfile": whole(called("cProfile", "run", CODE, b"N")),
    "bdb": whole(called("builtins", "getattr", called("bdb", "Bdb"), "run") + text(CODE) + b"\x85R"),
    "pydoc.pipepager": whole(called("pydoc", "pipepager", "x", SHELL)),
    "codecs.decode of a nested pickle": whole(
        called("pickle", "loads", called("codecs", "encode", whole(SYSTEM).decode("latin-1"), "latin-1"))
    ),
    "_pickle.loads": whole(called("_pickle", "loads", b"C" + bytes([len(whole(SYSTEM))]) + whole(SYSTEM))),
    "copyreg._reconstructor": whole(
        named("copyreg", "_reconstructor") + b"(" + named("builtins", "object") + named("builtins", "object")
        + EXEC + b"tR"
    ),
    "memo and DUP": whole(named("os", "system") + b"\x94" + b"0h\x00" + b"2" + text(SHELL) + b"\x85R0" + b"0N"),
    "a call as a dict's key": whole(b"}(" + SYSTEM + b"Nu"),
    "a call in a set": whole(b"\x8f(" + SYSTEM + b"\x90"),
    "a call before it is popped": whole(SYSTEM + b"0N"),
    "a call as an array's state": whole(
        named("numpy", "ndarray") + b"0" + called("numpy.core.multiarray", "_reconstruct", named("numpy", "ndarray"),
                                                  b"K\x00\x85", b"C\x01b") + SYSTEM + b"0"
    ),
    "numpy exec_command": whole(called("numpy.testing._private.utils", "runstring", CODE, EMPTY_DICT)),
    "an object array": whole(
        called("numpy", "array", b"(" + SYSTEM + b"t", b"N")
    ),
    "two pickles": whole(SYSTEM) + whole(SYSTEM),
}  # fmt: skip

INERT = {
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID": b"Pos.system\n.",
    "BINPERSID": b"\x80\x02" + text("storage") + b"Q.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "torch storage": whole(called("torch.storage", "_load_from_bytes", b"C\x01x")),
    "torch rebuild": whole(called("torch._utils", "_rebuild_tensor_v2", NONE)),
    "numpy.load": whole(called("numpy", "load", "x.npy")),
    "numpy.f2py": whole(called("numpy.f2py.crackfortran", "myeval", CODE)),
    "numpy.distutils": whole(called("numpy.distutils.exec_command", "exec_command", SHELL)),
    "ctypes": whole(called("ctypes", "CDLL", "libc.so.6")),
    "joblib": whole(called("joblib.numpy_pickle", "load", "x")),
    "dill": whole(called("dill._dill", "_create_function", NONE)),
    "cloudpickle": whole(called("cloudpickle.cloudpickle", "_make_function", NONE)),
    "pandas.eval": whole(called("pandas", "eval", CODE)),
    "asyncio": whole(called("asyncio.unix_events", "_UnixSubprocessTransport._start", "x")),
    "a dunder": whole(called("app", "Thing.__init__.__globals__", "x")),
    "a function of an application": whole(called("app.tools", "run_shell", SHELL)),
    "webbrowser": whole(called("webbrowser", "open", "file:///")),
    "getattr of what was refused": whole(called("builtins", "getattr", named("app", "Thing"), "__class__")),
    "a call of a record": whole(called("app", "Thing", "x") + EMPTY_TUPLE + b"R"),
    "a subclass of ndarray": whole(
        called("numpy.core.multiarray", "_reconstruct", named("app", "Evil"), b"K\x00\x85", b"C\x01b")
    ),
}

PAYLOADS = RUNS | INERT


@pytest.fixture
def marker(tmp_path, monkeypatch):
    path = tmp_path / "ran"
    monkeypatch.setenv("MARKER", str(path))
    return path


def test_there_are_enough_payloads():
    assert len(RUNS) >= 40


def test_pythons_own_pickle_runs_them(tmp_path):
    """In one process, so that the list above cannot be of payloads that do nothing."""
    script = (
        "import os, pickle, sys, time\n"
        "import numpy\n"
        "for name in sorted(os.listdir(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        os.environ['MARKER'] = os.path.join(sys.argv[2], name)\n"
        "        try: pickle.loads(open(os.path.join(sys.argv[1], name), 'rb').read())\n"
        "        except Exception: pass\n"
        "        time.sleep(0.05)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "time.sleep(1)\n"
    )
    given, ran = tmp_path / "given", tmp_path / "ran"
    given.mkdir()
    ran.mkdir()
    for i, data in enumerate(RUNS.values()):
        (given / f"{i:02d}").write_bytes(data)
    subprocess.run([sys.executable, "-c", script, given, ran], check=True, capture_output=True, timeout=120)
    names = list(RUNS)
    did_not = [names[i] for i in range(len(names)) if not (ran / f"{i:02d}").exists()]
    assert did_not == []


@pytest.mark.parametrize("name", PAYLOADS)
def test_none_runs_through_ours(name, marker):
    before = set(sys.modules)
    with pytest.raises(Bad) as error:
        load(PAYLOADS[name])
    assert error.value.reason in ("pickle_refused", "pickle_damaged")
    assert not marker.exists()
    assert {name for name in set(sys.modules) - before if not name.startswith("encodings.")} == set()


@pytest.mark.parametrize("protocol", range(6))
def test_reduce_at_every_protocol(protocol, marker):
    class Evil:
        def __reduce__(self):
            return os.system, (SHELL,)

    with pytest.raises(Bad, match=r"names (posix|os|nt)\.system") as error:
        load(pickle.dumps({"deep": [Evil()]}, protocol))
    assert error.value.reason == "pickle_refused"
    assert not marker.exists()


# --- bounds -------------------------------------------------------------------------------------------------


def nested(depth):
    return b"\x80\x04" + b"(" * depth + b"N" + b"t" * depth + b"."


def doubled(times):
    """A list of two references to a list of two references to ..."""
    return b"\x80\x04N\x94" + b"".join(b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(times)) + b"."


def copies(times):
    """One long string, encoded again and again."""
    start = named("_codecs", "encode") + b"\x940" + text("x" * 100_000) + b"\x940" + b"]"
    return whole(start + (b"h\x00h\x01" + text("latin-1") + b"\x86R" + b"a") * times)


DTYPE = called("numpy", "dtype", "f8")
BOMBS = {
    "bytearray(10**12)": whole(called("builtins", "bytearray", b"\x8a\x06" + (10**12).to_bytes(6, "little"))),
    "bytes(10**9)": whole(called("builtins", "bytes", b"J" + struct.pack("<i", 10**9))),
    "numpy.zeros": whole(called("numpy", "zeros", b"J" + struct.pack("<i", 10**9))),
    "range in a list": whole(called("builtins", "list", called("builtins", "range", b"J" + struct.pack("<i", 10**9)))),
    "a string of 10**12 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 10**12) + b"x.",
    "a bytearray of 10**12 bytes": b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b"x.",
    "an array larger than its bytes": whole(
        called("numpy.core.multiarray", "_reconstruct", named("numpy", "ndarray"), b"K\x00\x85", b"C\x01b")
        + b"(K\x01J" + struct.pack("<i", 10**9) + b"\x85" + DTYPE + b"\x89C\x08" + b"x" * 8 + b"tb"
    ),
    "an array of nothing, 10**9 times": whole(
        called("numpy._core.numeric", "_frombuffer", b"C\x00", called("numpy", "dtype", "S0"),
               b"J" + struct.pack("<i", 10**9) + b"\x85", "C")
    ),
    "a huge element": whole(called("numpy._core.numeric", "_frombuffer", b"C\x00", called("numpy", "dtype", "S9999999"),
                                   b"K\x00\x85", "C")),
    "a type that numpy lacks": whole(called("numpy._core.numeric", "_frombuffer", b"C\x00",
                                            called("numpy", "dtype", "b8"), b"K\x01\x85", "C")),
    "too deep": nested(1000),
    "far too deep": nested(200_000),
    "twice as much, thirty times": doubled(30),
    "the same text many times": copies(2000),
    "a value that holds itself": b"\x80\x04]\x94h\x00a.",
    "a record that holds itself": whole(named("app", "Thing") + EMPTY_TUPLE + b"\x81\x94}" + text("me") + b"h\x00sb"),
    "a huge integer": b"\x80\x04\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
    "keys that collide": b"\x80\x04}(\x8a\x0a" + b"\x7f" * 10 + b"Nu.",
    "a deep key": whole(b"}" + nested(50)[2:-1] + b"Ns"),
    "a huge memo index": b"\x80\x04Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name):
    with pytest.raises(Bad) as error:
        load(BOMBS[name])
    assert error.value.reason in ("pickle_refused", "pickle_damaged")


def test_limits_of_size(monkeypatch):
    with pytest.raises(Bad, match="longer than 10 bytes"):
        load(pickle.dumps("x" * 20), limit=10)
    monkeypatch.setattr(_pickle, "MAX_CONTAINERS", 100)
    with pytest.raises(Bad, match="more than 100 objects"):
        load(pickle.dumps([[] for _ in range(200)]))
    monkeypatch.setattr(_pickle, "MAX_OPCODES", 50)
    with pytest.raises(Bad, match="more than 50 opcodes"):
        load(pickle.dumps(list(range(200))))


DAMAGED = [b"", b".", b"not a pickle", gzip.compress(b"x", mtime=0)]
DAMAGED += [b"\x80\x04" + rest for rest in (b"", b"NN.", b"h\x05.", b"t.", b"0.", b"s.", b"(N.", b"}(Nu.")]


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged(data):
    with pytest.raises(Bad) as error:
        load(data)
    assert error.value.reason == "pickle_damaged"
