"""A sample of a recorded tensor tells another tensor as the whole would."""

import numpy as np
import pytest

from tests.parity.sampled import STRIDE, assert_recorded, recorded_names, sampled

TENSOR = np.random.default_rng(0).normal(size=(24, 48)).astype(np.float32)
CHANGES = {
    "an element that is not in the sample": lambda x: x + 0.1 * (np.arange(x.size) == 1),
    "a column": lambda x: x + 1e-3 * (np.arange(x.size) % 48 == 47),
    "the last row": lambda x: np.where(np.arange(x.size) < 23 * 48, x, 1.001 * x),
    "the order of rows": lambda x: x.reshape(24, 48)[::-1].ravel(),
    "the order of axes": lambda x: x.reshape(24, 48).T.ravel(),
}


def recorded_of(tensor):
    sample = sampled(tensor)
    return {"grad/w:sample": sample.values, "grad/w:rms": sample.rms, "grad/b": np.ones(2)}


def test_a_tensor_is_what_was_sampled_of_it():
    recorded = recorded_of(TENSOR)
    assert recorded_names(recorded, "grad/") == ["grad/b", "grad/w"]
    assert len(recorded["grad/w:sample"]) == -(-TENSOR.size // STRIDE)
    assert_recorded(TENSOR + 1e-6, recorded, "grad/w", atol=2e-6)
    assert_recorded(np.ones(2), recorded, "grad/b", atol=0)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change):
    changed = change(TENSOR.ravel()).astype(np.float32).reshape(TENSOR.shape)
    with pytest.raises(AssertionError):
        assert_recorded(changed, recorded_of(TENSOR), "grad/w", atol=1e-4)


def test_another_shape_is_noticed():
    with pytest.raises(AssertionError):
        assert_recorded(TENSOR[:, :-1], recorded_of(TENSOR), "grad/w", atol=10)
    with pytest.raises(AssertionError):
        assert_recorded(np.ones((2, STRIDE)), recorded_of(TENSOR), "grad/w", atol=10)
