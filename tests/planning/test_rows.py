"""The most rows that fit: by two programs and a check, never more than fits."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechlm2_jax.planning import memory
from speechlm2_jax.planning.rows import CLOSE, MOST_COMPILATIONS, base_of, most_rows
from speechlm2_jax.settings import SettingsError

BASE, ROW = 100.0, 7.0


def affine(rows):
    return BASE + ROW * rows


def test_two_programs_tell_the_third():
    fit = most_rows(affine, 1000.0, most=10_000)
    assert fit.rows == 128 == int((1000 - BASE) / ROW)
    assert list(fit.sizes) == [1, 2, 128] and fit.memory_bytes == affine(128)
    assert base_of(fit.sizes) == pytest.approx(BASE)


def test_another_bin_needs_one_program_and_a_check():
    fit = most_rows(affine, 1000.0, most=10_000, guess=100, base_bytes=BASE)
    assert list(fit.sizes) == [100, 128] and fit.rows == 128
    fit = most_rows(affine, 1000.0, most=10_000, guess=200, base_bytes=BASE)
    assert list(fit.sizes) == [200, 128] and fit.rows == 128
    fit = most_rows(affine, 1000.0, most=10_000, guess=127, base_bytes=BASE)
    assert list(fit.sizes) == [127]  # 1 % below


def test_no_row_fits_or_the_data_has_no_more():
    fit = most_rows(affine, 106.0, most=100)
    assert fit.rows == 0 and fit.memory_bytes == affine(1)
    assert most_rows(affine, 1000.0, most=5).rows == 5
    assert most_rows(affine, 1000.0, most=1).sizes == {1: affine(1)}
    below = most_rows(affine, 106.0, most=100, guess=4, base_bytes=BASE)
    assert below.rows == 0 and below.memory_bytes == affine(1)


def test_a_compiler_that_finds_no_room_is_asked_for_fewer():
    def memory_of(rows):
        return math.inf if affine(rows) > 1000 else affine(rows) * (0.8 if rows < 3 else 1)

    fit = most_rows(memory_of, 1000.0, most=10_000)
    assert math.inf in fit.sizes.values()
    assert 120 <= fit.rows <= 128 and len(fit.sizes) <= MOST_COMPILATIONS


@given(
    base=st.floats(0, 50),
    row=st.floats(0.1, 30),
    limit=st.floats(40, 800),
    kink=st.integers(1, 40),
    bend=st.floats(-0.1, 0.3),
    guess=st.integers(1, 500) | st.none(),
)
def test_never_more_than_fits_and_hardly_less(base, row, limit, kink, bend, guess):
    """Also where the line bends, as programs of few rows are compiled otherwise."""

    def memory_of(rows):
        return base + row * (rows + bend * max(rows - kink, 0))

    fit = most_rows(memory_of, limit, most=500, guess=guess, base_bytes=guess and base)
    wanted = max((rows for rows in range(501) if memory_of(rows) <= limit), default=0)
    assert fit.rows == 0 or memory_of(fit.rows) <= limit
    assert fit.rows >= min(wanted, 1) and fit.rows >= wanted * (1 - 2 * CLOSE) - 1
    assert len(fit.sizes) <= MOST_COMPILATIONS


@given(st.floats(100, 2000), st.floats(100, 2000))
def test_less_memory_never_gives_more_rows(one, other):
    rows = [most_rows(affine, limit, most=10_000).rows for limit in sorted((one, other))]
    assert rows == sorted(rows)


def test_a_program_needs_its_arguments_results_and_scratch():
    square = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    program = jax.jit(lambda x, y: jnp.sin(x @ y) @ y)
    found = memory.program_bytes(lambda: program.lower(square, square).compile())
    array = 4 * 256 * 256
    assert 4 * array <= found < 6 * array  # two arguments, a result, and at least one between


def test_a_program_without_room_or_without_figures():
    def fails():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")

    assert memory.program_bytes(fails) == math.inf
    silent: Any = SimpleNamespace(memory_analysis=lambda: None)
    with pytest.raises(SettingsError, match="does not tell the memory"):
        memory.program_bytes(lambda: silent)


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_containers_limit_is_the_machines_memory(tmp_path, name):
    whole = memory.machine_memory(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("123456789\n")
    assert memory.machine_memory(tmp_path) == 123456789 < whole
    path.write_text("max\n")
    assert memory.machine_memory(tmp_path) == whole


def test_devices_tell_their_memory_or_are_asked_for_it():
    cpus = jax.local_device_count("cpu")
    assert memory.device_memory(jax.devices("cpu")[0]) == memory.machine_memory() // cpus
    gpu = SimpleNamespace(platform="gpu", device_kind="X", memory_stats=lambda: {"bytes_limit": 7})
    assert memory.device_memory(gpu) == 7
    gpu.memory_stats = lambda: None
    with pytest.raises(SettingsError, match="give --memory-gib"):
        memory.device_memory(gpu)
