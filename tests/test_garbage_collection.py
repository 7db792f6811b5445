"""The garbage collector rests while a program starts, and only then."""

import gc

import pytest

from speechlm2_jax import garbage_collection


def test_collection_goes_on_after_the_start_even_one_that_fails():
    assert gc.isenabled()
    with pytest.raises(ValueError, match="no model"), garbage_collection.paused():
        assert not gc.isenabled()
        raise ValueError("no model")
    assert gc.isenabled()
    gc.unfreeze()


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with garbage_collection.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
