"""Helpers that several tests of the data room share."""

import io
import json
import tarfile
from dataclasses import fields

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.settings import SettingsError, build

TAG = "<|audioplaceholder|>"


def frames(samples: int) -> int:
    """A perception of one frame per 80 ms."""
    return -(-samples // 1280)


def write_manifest(path, rows):
    """Writes a NeMo manifest."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    """Reads a NeMo manifest."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def wav_bytes(seconds, value=0.1, rate_hz=16000):
    """A WAV of one value."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(round(seconds * rate_hz), value), rate_hz, format="WAV")
    return buffer.getvalue()


def write_tar(path, members, mode="w"):
    """Writes a tar of (name, bytes), in order; a name may come twice."""
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_lines(path, *rows):
    """Writes a JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_input_cfg(*entries, **more):
    """The sources of entries, as a SALM reads them."""
    values = {"input_cfg": list(entries), "batch_size": 1, **more}
    return read_sources(
        build(DataLoaderConfig, values, "data.train_ds"), "data.train_ds", SALMDataset.read
    )


def refusal(*entries, **more):
    """The one line that entries are refused with."""
    with pytest.raises(SettingsError) as caught:
        read_input_cfg(*entries, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def turns(conversation):
    """(role, text or id of the recording) of each turn."""
    return [(t.role, getattr(t, "text", None) or t.clip.id) for t in conversation.turns]


def assert_same(one, other):
    """Two batches are equal to the bit."""
    assert one.ids == other.ids and one.bucket == other.bucket
    for field in fields(one.arrays):
        left, right = getattr(one.arrays, field.name), getattr(other.arrays, field.name)
        np.testing.assert_array_equal(left, right, err_msg=field.name)
