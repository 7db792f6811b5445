"""Recordings that end long before the duration of their row are faults, whoever measured it."""

import json

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data import DataModule
from tests.data_pipeline.small_corpus import TAG, frames, read_input_cfg, write_lines

RATE = 16000


def recording(path, seconds, keeps=1.0):
    """A WAV whose header promises so many seconds, of which a share is there."""
    soundfile.write(path, np.full(round(seconds * RATE), 0.1), RATE)
    data = path.read_bytes()
    path.write_bytes(data[: 44 + round((len(data) - 44) * keeps)])
    return {"audio_filepath": path.name, "duration": seconds, "text": f"text of {path.name}"}


def test_a_truncated_wav_is_a_fault_and_its_text_is_not_trained_on(tokenizer, tmp_path):
    rows = [recording(tmp_path / f"{n}.wav", 1.0 + n / 10) for n in range(5)]
    rows.append(recording(tmp_path / "cut.wav", 1.5, keeps=0.4))
    manifest = write_lines(tmp_path / "m.jsonl", *rows)
    entry = {"manifest_filepath": manifest, "audio_locator_tag": TAG}
    common = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "seed": 1}
    train = {**common, "input_cfg": [entry], "batch_size": 3, "shuffle": True}
    module = DataModule({"train_ds": train}, tokenizer)
    module.keep_errors(tmp_path / "errors.jsonl")
    module.setup(frame_count=frames)
    stream = module.train_batches()
    batches = [next(stream) for _ in range(4)]
    stream.close()
    assert all(len(batch.ids) == 3 and "cut" not in batch.ids for batch in batches)
    assert dict(module.dropped) == {"truncated": 2}
    (first, _) = map(json.loads, (tmp_path / "errors.jsonl").read_text().splitlines())
    assert first["cause"] == "truncated" and first["id"] == "cut" and first["replaced_by"]


@pytest.mark.parametrize("more", [{}, {"sampling_rate": RATE}])
@pytest.mark.parametrize(
    ("seconds", "keeps", "offset", "expected"),
    [
        (2.0, 0.5, None, 2.0),  # half of it is missing
        (2.0, 0.8, None, 1.6),  # less than 0.5 s
        (0.5, 0.5, None, 0.5),  # 0.25 s, but half of it
        (2.0, 1.0, 1.2, 0.8),  # a segment ends with its file
    ],
)
def test_what_a_row_declares_is_kept_where_much_is_missing(
    tmp_path, more, seconds, keeps, offset, expected
):
    row = recording(tmp_path / "a.wav", seconds, keeps)
    place = {} if offset is None else {"offset": offset}
    manifest = write_lines(tmp_path / "m.jsonl", {**row, **place, **more})
    (source,) = read_input_cfg({"manifest_filepath": manifest})
    declared = seconds if more else expected
    assert source.conversations[0].clips[0].duration_s == pytest.approx(declared)


def test_a_turn_of_a_dialog_is_no_exception(tmp_path):
    row = recording(tmp_path / "a.wav", 2.0, keeps=0.5)
    audio = {"from": "User", "type": "audio", "value": "a.wav", "duration": row["duration"]}
    text = {"from": "Assistant", "type": "text", "value": "yes"}
    manifest = write_lines(tmp_path / "m.jsonl", {"conversations": [audio, text]})
    (source,) = read_input_cfg({"type": "multimodal_conversation", "manifest_filepath": manifest})
    assert source.conversations[0].clips[0].duration_s == 2.0


@pytest.mark.parametrize(("form", "is_kept"), [("MP3", True), ("WAV", False), ("FLAC", False)])
def test_a_header_that_tells_what_is_there_is_believed(tmp_path, form, is_kept):
    path = tmp_path / f"a.{form.lower()}"
    soundfile.write(path, np.full(RATE, 0.1), RATE, format=form)
    row = {"audio_filepath": path.name, "duration": 3.0, "text": "yes"}
    (source,) = read_input_cfg({"manifest_filepath": write_lines(tmp_path / "m.jsonl", row)})
    clip = source.conversations[0].clips[0]
    assert clip.duration_s == pytest.approx(3.0 if is_kept else 1.0, abs=0.05)
