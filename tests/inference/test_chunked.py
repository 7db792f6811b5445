"""`generate` on recordings longer than max_audio_s: each chunk is decoded as its own recording."""

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.inference.long_form.chunks import cut
from speechlm2_jax.inference.long_form.join_texts import join
from speechlm2_jax.models import SALM

DATA = Path(__file__).parents[1] / "data"
MAX_S = 1.0
SHORT = dict(max_new_tokens=8, max_audio_s=MAX_S)


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(DATA / "salm" / "llama_adapter_hf").eval()


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """The bundled clips of the tests one after the other, 4 s of them."""
    files = sorted((DATA / "salm" / "audio").glob("*.wav"))
    waves = [soundfile.read(file, dtype="float32")[0] for file in files]
    path = tmp_path_factory.mktemp("long") / "long.wav"
    soundfile.write(path, np.resize(np.concatenate(waves), 64_000), 16_000)
    return path


def asked(model, *audio):
    text = "Repeat after me: " + " ".join([model.audio_locator_tag] * len(audio))
    return [{"role": "user", "content": text, "audio": [str(a) for a in audio]}]


def test_a_long_recording_is_split_into_chunks_with_a_warning(model, long_file, caplog):
    short = DATA / "salm" / "audio" / "a0.wav"
    prompts = [asked(model, short), asked(model, long_file)]
    with caplog.at_level(logging.WARNING):
        responses = model.generate(prompts, **SHORT)
    wave = soundfile.read(long_file, dtype="float32")[0]
    chunks = cut(wave, rate_hz=16_000, max_s=MAX_S)
    (record,) = caplog.records
    assert f"prompt 1 ({long_file}): 4.0 s of audio" in record.getMessage()
    assert f"split into {len(chunks)} overlapping chunks" in record.getMessage()
    rows = [wave[c.start : c.end] for c in chunks] + [soundfile.read(short, dtype="float32")[0]]
    lengths = np.array([len(row) for row in rows])
    audios = np.stack([np.pad(row, (0, lengths.max() - len(row))) for row in rows])
    plain = [[{k: v for k, v in turn.items() if k != "audio"} for turn in prompts[0]]]
    alone = model.generate(plain * len(rows), audios, lengths, max_new_tokens=8)
    texts = [model.tokenizer.ids_to_text(row) for row in alone]
    assert responses[0, : alone.shape[1]].tolist() == alone[-1].tolist()
    expected = model.tokenizer.text_to_ids(join(texts[:-1], chunks))
    assert responses[1, : len(expected)].tolist() == expected
    whole = model.generate([prompts[1]], max_new_tokens=8, max_audio_s=False)
    assert len(caplog.records) == 1 and whole.shape == (1, 8), "false: never cut"


def test_what_cannot_be_split_is_refused_with_the_remedy(model, long_file):
    short = DATA / "salm" / "audio" / "a0.wav"
    with pytest.raises(ValueError, match="only a prompt with one recording can be split"):
        model.generate([asked(model, short, long_file)], **SHORT)
    with pytest.raises(ValueError, match="cannot be streamed; use generate, or raise max_audio_s"):
        model.stream([asked(model, long_file)], **SHORT)
    with pytest.raises(ValueError, match="num_return_sequences: a recording longer than max_aud"):
        model.generate([asked(model, long_file)], **SHORT, do_sample=True, num_return_sequences=2)
    with pytest.raises(ValueError, match="joined from chunks and has no score"):
        beams = dict(num_beams=2, return_dict_in_generate=True)
        model.generate([asked(model, long_file)], **SHORT, **beams)
    with pytest.raises(ValueError, match="max_audio_s=0.5 must be at least 1, or false"):
        model.generate([asked(model, long_file)], max_audio_s=0.5)
