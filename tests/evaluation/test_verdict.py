"""The verdict: which numbers make which sentence."""

from dataclasses import replace

import pytest

from speechlm2_jax.evaluation.results import Evaluation, Response, Speed, TrainingSummary
from speechlm2_jax.evaluation.verdict import verdict

RIGHT = "one two three four"
WRONG = "one two three five"
FALSE = "nothing like it here"


def _evaluation(count=200, *, wrong=0, encoder_wrong=None, controls=None, **fields):
    """The first `wrong` responses have one error in four words; of the encoder alike."""
    responses = [
        Response(
            id=str(n),
            duration_s=1.0,
            text=RIGHT,
            pred_text=WRONG if n < wrong else RIGHT,
            encoder_text=None if encoder_wrong is None else WRONG if n < encoder_wrong else RIGHT,
            controls=controls or {},
        )
        for n in range(count)
    ]
    return Evaluation(responses=tuple(responses), speed=Speed(), normalizer="none", **fields)


def _sentences(evaluation):
    return verdict(evaluation.totals())


@pytest.mark.parametrize(
    ("encoder_wrong", "wrong", "expected", "kind"),
    [
        (120, 40, "The LLM makes the encoder's 15.0 % WER into 5.0 %: better (95 %: -", "good"),
        (40, 120, "The LLM makes the encoder's 5.0 % WER into 15.0 %: worse (95 %: +", "bad"),
        (40, 41, "The LLM makes the encoder's 5.0 % WER into 5.1 %: no difference larger than "
         "chance (95 %: +0.0 to +", "neutral"),
    ],
)  # fmt: skip
def test_the_first_sentence_is_what_the_llm_makes_of_the_encoder(
    encoder_wrong, wrong, expected, kind
):
    first = _sentences(_evaluation(wrong=wrong, encoder_wrong=encoder_wrong))[0]
    assert first.text.startswith(expected), first.text
    assert first.kind == kind


@pytest.mark.parametrize(
    ("swapped", "wrong", "expected", "kind"),
    [
        (FALSE, 40, "It uses the audio: WER is 5.0 %, 100.0 % with swapped audio", "good"),
        (WRONG, 160, "It uses the audio only in part: WER is 20.0 %, 25.0 % with", "bad"),
        (WRONG, 198, "It does not use the audio: WER is 24.8 %, 25.0 % with", "bad"),
        (RIGHT, 40, "It does not use the audio: WER is 5.0 %, 0.0 % with", "bad"),
    ],
)
def test_a_model_uses_the_audio_if_the_right_one_removes_the_errors(swapped, wrong, expected, kind):
    (found,) = (
        s
        for s in _sentences(_evaluation(wrong=wrong, controls={"swapped": swapped}))
        if "audio" in s.text
    )
    assert found.text.startswith(expected), found.text
    assert found.kind == kind


def test_of_few_utterances_it_is_not_certain():
    case = _evaluation(4, wrong=1)
    responses = [
        replace(a, controls={"silent": WRONG if n < 2 else RIGHT})
        for n, a in enumerate(case.responses)
    ]
    found = next(
        s for s in _sentences(replace(case, responses=tuple(responses))) if "audio" in s.text
    )
    assert found.text.startswith("It is not certain that it uses the audio: WER is 6.2 %, 12.5 %")


def test_of_a_metric_where_more_is_better_the_rule_is_the_same():
    case = _evaluation(metrics=("bleu",), controls={"silent": FALSE})
    found = next(s for s in _sentences(case) if "audio" in s.text)
    assert found.text == "It uses the audio: BLEU is 100.0 %, 0.0 % with silence."


def test_without_controls_or_training_data_the_verdict_has_no_claim_about_them():
    texts = [s.text for s in _sentences(_evaluation())]
    assert "Whether it uses the audio is not tested; controls=true tests it." in texts
    assert "The training data could not be read, so overlap with it is not known." in texts


def test_what_the_training_had_is_scored_apart():
    case = _evaluation(wrong=50, training=TrainingSummary(rows=7))
    marked = [replace(a, is_seen_text=n < 100) for n, a in enumerate(case.responses)]
    texts = [s.text for s in _sentences(replace(case, responses=tuple(marked)))]
    assert (
        "100 references of the test set are in the training data (7 rows): WER is "
        "12.5 % on these references, 0.0 % on the others."
    ) in texts
    clean = [s for s in _sentences(case) if "training" in s.text]
    assert clean == [("No reference and no recording is in the training data (7 rows).", "good")]
    partly = replace(case, training=TrainingSummary(rows=7, unread=("b.jsonl",)))
    (found,) = (s for s in _sentences(partly) if "training" in s.text)
    assert "in what could be read of the training data" in found.text
    assert found.kind == "neutral"


def test_few_utterances_and_wide_intervals_are_called_so():
    assert _sentences(_evaluation(wrong=150))[-1].text.startswith("200 utterances: WER is 18.8 %")
    few = "These are too few for small differences."
    assert _sentences(_evaluation(50, wrong=40))[-1].text.endswith(few)
    assert _sentences(_evaluation(200, wrong=5))[-1].text.endswith(few)
    assert "few" not in _sentences(_evaluation(wrong=150))[-1].text


def test_swapped_audio_and_no_references_have_no_verdict():
    case = _evaluation()
    swapped = tuple(replace(a, audio_of="other") for a in case.responses)
    unscored = tuple(replace(a, text=None) for a in case.responses)
    assert _sentences(replace(case, responses=swapped)) == []
    assert _sentences(replace(case, responses=unscored)) == []
