"""What the audio codec refuses: rows that are none, streams if it looks ahead, other configs."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.models import AudioCodec
from speechlm2_jax.pretrained.codec_config import codec_config
from speechlm2_jax.settings import SettingsError

DATA = Path(__file__).parents[1] / "data" / "codec"


@cache
def codec(name):
    return AudioCodec.from_pretrained(DATA / f"{name}.nemo")


def test_a_codec_that_looks_ahead_decodes_no_stream():
    with pytest.raises(ValueError, match="only a causal decoder .* decode whole recordings"):
        codec("lfr22_tiny").new_stream()


def test_rows_and_lengths_that_do_not_fit_are_refused():
    model = codec("causal_tiny")
    with pytest.raises(
        ValueError, match=r"rank 2 and one length per element, got \(9,\) and \(1,\)"
    ):
        model.encode(np.zeros(9), [9])
    with pytest.raises(ValueError, match=r"lengths \[10\] must lie within 0 and 9"):
        model.encode(np.zeros((1, 9)), [10])
    with pytest.raises(ValueError, match="rank 3 and one length per element"):
        model.decode(np.zeros((1, 4)), [4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vector_quantizer": None}, "vector_quantizer"),
        (
            {"vector_quantizer": {"_target_": "nemo.ResidualVectorQuantizer", "num_codebooks": 8}},
            "ResidualVectorQuantizer",
        ),
        ({"semantic_codec": {"sample_rate": 1}}, "semantic codec inside a codec is not supported"),
        ({"samples_per_frame": 1000}, "must multiply to samples_per_frame=1000"),
        ({"output_sample_rate": 44100}, "output_sample_rate=44100 must equal sample_rate=22050"),
    ],
)
def test_a_codec_that_is_not_supported_is_refused_by_its_key(changes, message):
    config = {**read_nemo(DATA / "lfr22_tiny.nemo").config, **changes}
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(SettingsError, match=message):
        codec_config(config, "model.pretrained_audio_codec")
