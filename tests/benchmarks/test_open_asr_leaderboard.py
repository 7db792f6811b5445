"""The benchmark by the Open ASR Leaderboard's protocol: order, prompt, what is left out, WER."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile

from benchmarks import open_asr_leaderboard

TEXTS = {"a": "Any more tea?", "b": "it's ten", "c": "ignore time segment in scoring", "d": ""}
SECONDS = {"a": 0.5, "b": 1.0, "c": 2.0, "d": 2.0}
RATE_HZ = 8000
TRANSCRIPTS = {0.5: "anymore tea", 1.0: "it is 9"}
"""What the model transcribes, by the length of a recording in seconds."""


def wav(name):
    file = io.BytesIO()
    soundfile.write(file, np.full(int(SECONDS[name] * RATE_HZ), 0.1), RATE_HZ, format="WAV")
    return file.getvalue()


class Model:
    audio_locator_tag, sampling_rate, text_eos_id, text_pad_id = "<audio>", 16_000, 1, 0

    def __init__(self):
        self.calls = []
        self.tokenizer = SimpleNamespace(ids_to_text=lambda ids: TRANSCRIPTS[ids[0] / 100])

    def generate(self, prompts, audios, lengths, max_new_tokens):
        self.calls.append((prompts, audios.shape, lengths.tolist(), max_new_tokens))
        return np.stack([lengths // 160, np.full_like(lengths, 1), lengths], axis=1)


def check(place):
    model = Model()
    chosen = open_asr_leaderboard.recordings(place)
    assert [one.text for one in chosen] == [TEXTS["b"], TEXTS["a"]]  # longest first
    figures, texts = open_asr_leaderboard.score(model, chosen, batch=1)
    assert texts == [TRANSCRIPTS[1.0], TRANSCRIPTS[0.5]]
    message = [[{"role": "user", "slots": {"message": "Transcribe the following: <audio>"}}]]
    expected = [(message, (1, n), [n], 128) for n in (16_000, 8_000)]
    assert model.calls == expected * 2  # a warm-up, and the run that counts
    assert figures["wer_percent"] == round(100 / 6, 2)  # 9 for 10; any more tea, it is 10
    assert figures["wer_percent_jiwer"] == 50
    assert figures["audio_s"] == 1.5 and figures["rtfx"] > 0


def test_a_folder_of_parquet_files(tmp_path):
    rows = [{"audio": {"bytes": wav(n), "path": n}, "sentence": TEXTS[n], "id": n} for n in TEXTS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    check(tmp_path)


def test_a_manifest(tmp_path):
    for name in TEXTS:
        (tmp_path / f"{name}.wav").write_bytes(wav(name))
    rows = [json.dumps({"audio_filepath": f"{n}.wav", "text": TEXTS[n]}) for n in TEXTS]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    check(tmp_path / "test.jsonl")
