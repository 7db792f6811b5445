"""Generated speech is scored by its transcript."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.data.audio import sinc_resample
from speechlm2_jax.evaluation.metrics.asr_bleu import ASRBLEU, ScoringASRModel
from speechlm2_jax.models import ASRModel

ASR = Path(__file__).parents[1] / "data" / "asr"


class Counter:
    """Transcribes a recording as one word per hundred samples; records its inputs."""

    sampling_rate = 16000

    def __init__(self):
        self.inputs = []

    def transcribe(self, audio, lengths):
        self.inputs += [row[:n] for row, n in zip(audio, lengths, strict=True)]
        return ["word " * (n // 100) for n in lengths.tolist()]


@pytest.fixture
def speech():
    return np.random.default_rng(0).normal(scale=0.1, size=(3, 700)).astype(np.float32)


def test_speech_is_resampled_and_its_padding_removed(speech):
    counter = Counter()
    texts = ASRBLEU(counter).update("a", ["x"] * 3, speech, [700, 441, 0], sample_rate_hz=22050)
    assert [len(wave) for wave in counter.inputs] == [700 * 16000 // 22050, 320, 0]
    assert texts == ["word " * 5, "word " * 3, ""]
    expected = sinc_resample(speech[1, :441], 22050, 16000)[:320]
    np.testing.assert_array_equal(counter.inputs[1], expected)


def test_scores_are_those_of_the_transcripts(speech):
    counter = Counter()
    metric, other = ASRBLEU(counter), ASRBLEU(counter)
    metric.update("a", ["word word word word"], speech[:1], [400], sample_rate_hz=16000)
    other.update("b", ["word word"], speech[:1], [300], sample_rate_hz=16000)
    metric.merge(other)
    scores = metric.compute()
    assert (scores["asr_bleu_a"], scores["wer_a"], scores["cer_a"]) == (pytest.approx(100), 0, 0)
    assert scores["wer_b"] == pytest.approx(0.5)
    assert scores["wer"] == pytest.approx(0.25)
    sets = [f"{key}{end}" for key in ("asr_bleu", "wer", "cer") for end in ("_a", "_b", "")]
    assert list(scores) == sets
    assert ASRBLEU(counter).compute() == {}


def test_recordings_references_and_lengths_must_pair_up(speech):
    with pytest.raises(ValueError, match="'a': 2 references, 3 recordings and 3 lengths"):
        ASRBLEU(Counter()).update("a", ["x", "y"], speech, sample_rate_hz=22050)


def test_a_nemo_asr_model_transcribes_as_in_nemo():
    model = ASRModel.from_pretrained(ASR / "ctc.nemo")
    assert isinstance(model, ScoringASRModel)
    given = load_file(ASR / "ctc_golden.safetensors")
    expected = json.loads((ASR / "hypotheses.json").read_text())["ctc"]["transcribe"][1:]
    metric = ASRBLEU(model)
    audio, lengths = given["audio"], given["audio_len"]
    assert metric.update("a", expected, audio, lengths, sample_rate_hz=16000) == expected
    assert metric.compute()["wer_a"] == 0
    silent = metric.update("b", ["", expected[1]], audio, [0, lengths[1]], sample_rate_hz=16000)
    assert silent == ["", expected[1]]
