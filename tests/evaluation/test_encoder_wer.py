"""The encoder's own CTC head beside the model: which recordings it transcribes, its score."""

import jax
import numpy as np

from speechlm2_jax import processes
from speechlm2_jax.evaluation.encoder_wer import RemembersTexts, encoder_texts, open_ctc_model
from speechlm2_jax.evaluation.results import Evaluation, Response, Speed
from speechlm2_jax.evaluation.score_table import table
from tests.evaluation.page_case import utterance


class FakeCTCModel:
    """Transcribes a recording as its number of whole seconds."""

    sampling_rate = 16_000

    def __init__(self):
        self.batches = []

    def transcribe(self, waves):
        assert all(wave.dtype == np.float32 for wave in waves)
        self.batches.append([len(wave) for wave in waves])
        return [f"{len(wave) // 16_000} seconds" for wave in waves]


def test_texts_come_back_in_input_order_and_neighbours_in_length_go_together():
    ctc_model = FakeCTCModel()
    utterances = [utterance(f"u{s}", float(s)) for s in (1, 4, 2, 3)]
    texts = encoder_texts(ctc_model, utterances, batch_size=2)
    assert texts == ["1 seconds", "4 seconds", "2 seconds", "3 seconds"]
    assert ctc_model.batches == [[64_000, 48_000], [32_000, 16_000]]


def test_long_recordings_are_transcribed_in_chunks():
    ctc_model = FakeCTCModel()
    short, long = encoder_texts(
        ctc_model, [utterance("u", 1.0), utterance("long", 5.0)], batch_size=2, max_s=3.0
    )
    assert max(map(len, ctc_model.batches)) == 2, "however many chunks a recording has"
    *chunks, last = (length for batch in ctc_model.batches for length in batch)
    assert len(chunks) > 1 and max(chunks) <= 48_000 and sum(chunks) > 80_000 and last == 16_000
    assert short == "1 seconds" and len(long.split()) < 2 * len(chunks), "the overlaps are joined"


def test_a_recording_that_cannot_be_read_has_no_text():
    texts = encoder_texts(FakeCTCModel(), [utterance("broken", 2.0), utterance("u", 1.0)], 4)
    assert texts == [None, "1 seconds"]
    assert encoder_texts(FakeCTCModel(), [utterance("broken", 2.0)], 4) == [None]


def test_what_was_transcribed_for_drafts_is_not_transcribed_again():
    ctc_model = FakeCTCModel()
    once = RemembersTexts(ctc_model)
    utterances = [utterance(f"u{s}", float(s)) for s in (1, 2, 3)]
    waves = [u.read(16_000) for u in utterances]
    drafts = once.transcribe([waves[1], waves[0], waves[1]])
    assert drafts == ["2 seconds", "1 seconds", "2 seconds"]
    assert ctc_model.batches == [[32_000, 16_000]]
    assert encoder_texts(once, utterances, batch_size=2) == [f"{n} seconds" for n in (1, 2, 3)]
    assert ctc_model.batches == [[32_000, 16_000], [48_000]]


def test_several_processes_transcribe_each_a_part(monkeypatch):
    utterances = [utterance(f"u{s}", float(s)) for s in (1, 2, 3)]
    sent: list[str] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in (1, 0):
        gather = (lambda text: sent.append(text) or [text]) if index else lambda text: [text, *sent]
        monkeypatch.setattr(processes, "gather_texts", gather)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        ctc_model = FakeCTCModel()
        texts = encoder_texts(ctc_model, utterances, batch_size=4)
        assert ctc_model.batches == ([[32_000]] if index else [[48_000, 16_000]])
    assert texts == ["1 seconds", "2 seconds", "3 seconds"]


def test_it_is_scored_on_the_utterances_that_the_model_is_scored_on():
    responses = (
        Response(id="a", duration_s=1.0, text="One two", pred_text="one two"),
        Response(id="b", duration_s=1.0, text="three", pred_text="", error="bad"),
        Response(id="c", duration_s=1.0, text=None, pred_text="four"),
    )
    result = Evaluation(responses=responses, speed=Speed(), normalizer="basic")
    assert result.encoder_errors() is None
    assert "encoder" not in table(result.totals())
    beside = result.with_encoder_texts(["one too!", "three", "four"])
    errors = beside.encoder_errors()
    assert errors is not None
    assert (errors.substitutions, errors.reference_words) == (1, 2)
    assert beside.word_errors() == result.word_errors()
    assert "encoder alone (CTC) 50.00% over 2 words" in " ".join(table(beside.totals()).split())
    assert [row.get("encoder_text") for row in beside.rows()] == ["one too!", "three", "four"]


def test_the_encoders_own_file_is_opened_as_a_ctc_model(monkeypatch, tmp_path):
    from speechlm2_jax import models

    asked = []

    class CTCModel:
        @staticmethod
        def from_pretrained(path):
            asked.append(path)
            return FakeCTCModel()

    monkeypatch.setitem(vars(models), "CTCModel", CTCModel)
    assert isinstance(open_ctc_model(tmp_path / "encoder.nemo"), FakeCTCModel)
    assert asked == [tmp_path / "encoder.nemo"]
