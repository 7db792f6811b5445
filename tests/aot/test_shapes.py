"""The batch shape that is compiled ahead of time, by settings alone."""

from types import SimpleNamespace

import pytest

from speechlm2_jax.aot.shapes import largest_shape

ASKED = SimpleNamespace(tokens=None, rows=None, seconds=None)


@pytest.mark.parametrize(
    ("train", "tokens", "rows"),
    [
        ({"bucket_duration_bins": [50, 100], "bucket_batch_size": [4, 2]}, 104, 2),
        ({"bucket_duration_bins": [[50, 20], [100, 30]], "bucket_batch_size": [4, 2]}, 136, 2),
        ({"batch_tokens": 4000, "max_tokens": 1000}, 1000, 4),
    ],
)
def test_the_largest_shape_is_that_of_the_last_bin_or_of_the_budget(train, tokens, rows):
    model = SimpleNamespace(sampling_rate=16000)
    setup = SimpleNamespace(sharding=SimpleNamespace(length_multiple=1))
    shape = largest_shape(train, ASKED, model, setup)
    assert (shape.tokens, shape.sequences, shape.clips) == (tokens, rows, rows)
