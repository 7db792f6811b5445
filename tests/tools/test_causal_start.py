"""A causal encoder that starts from one with full context."""

from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.models import CTCModel
from tools.causal_start import LOG_MEL_DEVIATION, LOG_MEL_MEAN, causal_start
from tools.make_tiny_encoder import causal_settings

ROOT = Path(__file__).parents[2]
PARTS = ROOT / "configs" / "parts"


@pytest.fixture(scope="module")
def full():
    return CTCModel.from_pretrained(PARTS / "tiny_encoder.nemo")


@pytest.fixture(scope="module")
def causal(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    (folder / "tokenizer.model").write_bytes(full.tokenizer.serialized())
    overlay = PARTS / "tiny_encoder_causal.yaml"
    return CTCModel.from_pretrained(causal_start(full, folder, overlay, folder / "start.nemo"))


def test_what_fits_is_taken_over_and_the_bands_move_up(full, causal):
    np.testing.assert_array_equal(causal.variables["head.weight"], full.variables["head.weight"])
    path = "encoder.subsampling.output.weight"
    old, new = (np.asarray(m.variables[path]) for m in (full, causal))
    np.testing.assert_array_equal(
        new.reshape(len(new), 64, 11)[:, :, 1:], old.reshape(len(old), 64, 10)
    )
    assert not new.reshape(len(new), 64, 11)[:, :, 0].any()


def test_the_first_convolution_normalizes_raw_bands(full, causal):
    first = "encoder.subsampling.conv_in"
    (old, old_bias), (new, new_bias) = (
        [np.asarray(m.variables[f"{first}.{name}"], np.float64) for name in ("weight", "bias")]
        for m in (full, causal)
    )
    patch = np.random.default_rng(0).normal(LOG_MEL_MEAN, LOG_MEL_DEVIATION, (3, 3))
    normal = (patch - LOG_MEL_MEAN) / LOG_MEL_DEVIATION
    before = (old * normal).sum(axis=(1, 2, 3)) + old_bias
    np.testing.assert_allclose((new * patch).sum(axis=(1, 2, 3)) + new_bias, before, atol=1e-4)


def test_it_can_stream(causal):
    assert causal.session().chunk_s == 0.08


def test_settings_of_a_round_have_all_shares():
    made = causal_settings(10, 1e-3, {Path("a"): 0.25, Path("b"): 0.75})
    entries = made["data"]["train_ds"]["input_cfg"]
    assert [entry["weight"] for entry in entries] == [0.25, 0.75]
    assert made["trainer"]["max_steps"] == 10 and made["model"]["optimizer"]["lr"] == 1e-3
