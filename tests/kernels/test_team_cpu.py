"""The team of threads and the compiler of operations: barriers, tiles claimed once, variants kept apart."""

import os
import subprocess
import sys

import numpy as np
import pytest

from polybatch.errors import EngineError
from polybatch.kernels.cpu.compile import cache_root, compile_function, rebind
from polybatch.kernels.cpu.team import (
    ARGS,
    ROW,
    Program,
    Team,
    await_units,
    claim,
    load_i64,
    report_done,
    store_i64,
)

TILES = 50


def _double_tiles(args, state, tid, num_threads):
    """target[i] = 2 * source[i] + state[0], each i claimed by one thread; visits[i] counts them."""
    while True:
        i = claim(load_i64(args, 1))
        if i >= TILES:
            break
        claim(load_i64(args, ARGS + 2) + 8 * i)
        value = 2 * load_i64(load_i64(args, ARGS), i) + load_i64(state, 0)
        store_i64(load_i64(args, ARGS + 1), TILES - 1 - i, value)
        report_done(load_i64(args, 1))
    await_units(args, TILES)


def _store_value(args, state, tid, num_threads):
    store_i64(state, 0, VALUE)  # noqa: F821 - bound by the variants below


def chain(length):
    """A program in which every operation reads what the one before wrote, back to front."""
    buffers = np.zeros((length + 1, TILES), dtype=np.int64)
    visits = np.zeros((length, TILES), dtype=np.int64)
    buffers[0] = np.arange(TILES)
    double = compile_function("test-double-tiles", _double_tiles)
    addresses = [buffer.ctypes.data for buffer in buffers]
    operations = [(double, [addresses[i], addresses[i + 1], visits[i].ctypes.data]) for i in range(length)]
    return Program(operations), buffers, visits


def expected_chain(first, length, offset):
    for _ in range(length):
        first = (2 * first + offset)[::-1]
    return first


@pytest.fixture(params=[1, 2, 3])
def team(request):
    built = Team(request.param)
    yield built
    built.close()


def test_an_operation_sees_all_that_the_one_before_wrote(team):
    program, buffers, visits = chain(12)
    state = np.array([5], dtype=np.int64)
    for repeat in range(1, 40):
        buffers[1:] = -1
        team.run(program, state.ctypes.data)
        assert np.array_equal(buffers[-1], expected_chain(np.arange(TILES), 12, 5))
        assert (visits == repeat).all()


def test_parts_of_a_program_run_as_the_whole_does(team):
    program, buffers, visits = chain(5)
    state = np.array([1], dtype=np.int64)
    team.run(program, state.ctypes.data, 0, 2)
    assert visits.sum(axis=1).tolist() == [TILES, TILES, 0, 0, 0]
    team.run(program, state.ctypes.data, 2)
    assert np.array_equal(buffers[-1], expected_chain(np.arange(TILES), 5, 1))
    assert (visits == 1).all()


def test_a_program_without_operations_leaves_the_next_one_whole(team):
    empty = Program([])
    program, buffers, visits = chain(1)
    state = np.zeros(1, dtype=np.int64)
    for repeat in range(1, 200):
        team.run(empty, state.ctypes.data)
        team.run(program, state.ctypes.data, 1)
        team.run(program, state.ctypes.data)
        assert (visits == repeat).all()
    assert np.array_equal(buffers[1], expected_chain(np.arange(TILES), 1, 0))


def test_closing_twice_ends_the_threads_and_forbids_programs(team):
    program, _, visits = chain(1)
    team.close()
    team.close()
    with pytest.raises(EngineError, match="closed"):
        team.run(program, np.zeros(1, dtype=np.int64).ctypes.data)
    assert not visits.any()


def test_an_operation_takes_no_more_arguments_than_its_row_holds():
    assert Program([(0, [7] * (ROW - ARGS))]).table[0, -1] == 7
    with pytest.raises(EngineError, match=f"{ROW - ARGS + 1} arguments"):
        Program([(0, [7] * (ROW - ARGS + 1))])


def test_the_cache_folder_honours_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "polybatch" / "kernels"
    compile_function(f"test-store-{os.getpid()}", _store_value, bindings={"VALUE": 1})
    assert any(tmp_path.rglob("test-store-*"))


def test_variants_of_a_function_get_symbols_of_their_own():
    names = {rebind(_store_value, {"VALUE": n}, f"variant-{n}").__qualname__ for n in range(3)}
    assert len(names) == 3


def values_of_two_variants():
    values = []
    for n in (1, 2):
        address = compile_function(f"test-value-{n}", _store_value, bindings={"VALUE": n})
        state = np.zeros(1, dtype=np.int64)
        team = Team(1)
        team.run(Program([(address, [])]), state.ctypes.data)
        team.close()
        values.append(int(state[0]))
    return values


@pytest.mark.slow
def test_a_variant_loaded_from_the_cache_keeps_its_code_beside_one_compiled_now(tmp_path):
    """Equal symbols would let the linker give the second variant the first one's code."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_team_cpu as t; "
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    here = os.path.dirname(__file__)
    first = "t.compile_function('test-value-1', t._store_value, bindings={'VALUE': 1})"
    subprocess.run([sys.executable, "-c", script + first, here], env=environment, check=True)
    both = "assert t.values_of_two_variants() == [1, 2], t.values_of_two_variants()"
    subprocess.run([sys.executable, "-c", script + both, here], env=environment, check=True)
