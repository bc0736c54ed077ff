"""Compiled operations on disk: written whole, checked before use, mapped without numba."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from polybatch.kernels.cpu import compile as compiling
from polybatch.kernels.cpu import objects
from polybatch.kernels.cpu.compile import compile_function, compiling_only, looking_up
from polybatch.kernels.cpu.team import Program, Team, claim, load_i64, store_i64, yield_processor

pytestmark = pytest.mark.skipif(not objects.is_supported(), reason="objects are mapped on x86-64 Linux only")


def _count(args: int, state: int, tid: int, num_threads: int) -> None:
    while claim(load_i64(args, 1)) < 1:
        store_i64(state, 0, load_i64(state, 0) + STEP)  # noqa: F821 - bound per variant
        yield_processor()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "_addresses", {})
    return tmp_path


def compiled(step):
    return compile_function(f"test-count-{step}", _count, bindings={"STEP": step})


def forget():
    compiling._addresses.clear()


def run(address):
    state = np.zeros(1, dtype=np.int64)
    team = Team(2)
    team.run(Program([(address, []), (address, [])]), state.ctypes.data)
    team.close()
    return int(state[0])


def the_file(cache, name):
    (path,) = cache.rglob(f"{name}.kernel")
    return path


def test_an_operation_from_disk_computes_what_it_computed_when_it_was_compiled(cache):
    first = run(compiled(5))
    forget()
    assert [first, run(compiled(5)), run(compiled(7))] == [10, 10, 14]


def test_nothing_of_numba_stays_on_disk(cache):
    compiled(5)
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".kernel"}


@pytest.mark.parametrize("at", [0, 30, 60, 200, -1])
def test_a_damaged_file_is_refused_and_compiled_again(cache, at, caplog):
    compiled(5)
    path = the_file(cache, "test-count-5")
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(objects.ObjectFileError):
        objects.load(path)
    forget()
    assert run(compiled(5)) == 10
    assert "compiling it again" in caplog.text
    assert objects.load(path)


def test_a_truncated_file_is_refused(cache):
    compiled(5)
    path = the_file(cache, "test-count-5")
    whole = path.read_bytes()
    for size in (0, 10, len(objects.MAGIC) + 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(objects.ObjectFileError):
            objects.load(path)


def test_an_object_that_calls_what_is_not_there_is_refused(cache):
    compiled(5)
    path = the_file(cache, "test-count-5")
    body = path.read_bytes()[len(objects.MAGIC) + objects._HEADER.size :]
    name, code = body[: body.index(b"\x7fELF")], body[body.index(b"\x7fELF") :]
    objects.save(path, name.decode(), code.replace(b"sched_yield\0", b"no_such_fun\0"))
    with pytest.raises(objects.ObjectFileError, match="no_such_fun"):
        objects.load(path)
    objects.save(path, "another_symbol", code)
    with pytest.raises(objects.ObjectFileError, match="another_symbol"):
        objects.load(path)


def test_looking_up_names_what_is_missing_and_compiles_nothing(cache):
    compiled(5)
    forget()
    with looking_up() as missing:
        assert compiled(5) != 0
        assert compiled(7) == 0
    assert missing == ["test-count-7"]
    assert not list(cache.rglob("test-count-7*"))


def test_a_share_of_the_work_leaves_the_rest_alone(cache):
    with compiling_only({"test-count-7"}):
        assert compiled(5) == 0
        assert compiled(7) != 0
    assert not list(cache.rglob("test-count-5*"))


def test_a_start_with_kernels_on_disk_imports_no_compiler(cache):
    compiled(5)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_objects_cpu as t; assert t.compiled(5); "
        "assert not {'numba', 'llvmlite.binding'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__)], env=environment, check=True)
