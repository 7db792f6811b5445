"""Metrics of responses: their values, intervals, and the paired comparison of two evaluations."""

import json

import numpy as np
import pytest
import sacrebleu

from speechlm2_jax.commands import evaluate
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.metrics.error_rates import character_error_rate, word_error_rate
from speechlm2_jax.evaluation.metrics.resampling import compare, estimate
from speechlm2_jax.evaluation.metrics.task_metrics import TASK_METRICS, read_choice, read_command
from speechlm2_jax.evaluation.results import Evaluation, Response, Speed
from speechlm2_jax.evaluation.score_table import table

REFERENCES = ("the cat sat on the mat", "One two, three.", "a", "")
HYPOTHESES = ("the cat is on mat", "one two three", "b c", "x")
PAIRS = list(zip(REFERENCES, HYPOTHESES, strict=True))


@pytest.mark.parametrize(
    ("name", "normalizer", "expected"),
    [
        ("wer", "none", 100 * word_error_rate(REFERENCES, HYPOTHESES)),
        ("cer", "none", 100 * character_error_rate(REFERENCES, HYPOTHESES)),
        ("bleu", "english", sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score),
        ("chrf", "english", sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score),
    ],
)
def test_sums_of_counts_are_the_metric_of_the_corpus(name, normalizer, expected):
    found = estimate(TASK_METRICS[name], PAIRS, normalizer)
    assert found.value == pytest.approx(expected, abs=1e-9)
    assert found.low is not None and found.low <= expected <= found.high


def test_texts_are_normalised_for_error_rates():
    assert estimate(TASK_METRICS["wer"], PAIRS[1:2], "basic").value == 0


ORDER = {"intent": "orderDrink", "size": "twelve ounce", "roast": "dark roast"}


@pytest.mark.parametrize(
    ("response", "is_accepted"),
    [
        (json.dumps(ORDER), True),
        ('Sure: {"roast": "Dark  roast", "size":"twelve ounce","intent":"orderdrink"}!', True),
        (json.dumps({**ORDER, "size": "six ounce"}), False),
        (json.dumps({**ORDER, "milkAmount": "milk"}), False),  # a slot that nobody spoke
        (json.dumps({"intent": "orderDrink", "roast": "dark roast"}), False),
        ('{"intent": "orderDrink", "roast": ', False),
        ("[1]", False),
        ("", False),
    ],
)
def test_a_command_is_accepted_if_intent_and_all_slots_are_right(response, is_accepted):
    found = estimate(TASK_METRICS["intent"], [(json.dumps(ORDER), response)], "english")
    assert found.value == 100 * is_accepted


def test_each_slot_has_its_accuracy():
    pairs = [
        (json.dumps(ORDER), json.dumps({**ORDER, "size": "six ounce"})),
        (json.dumps(ORDER), json.dumps(ORDER)),
        (json.dumps({"intent": "orderDrink"}), "no command"),
    ]
    details = TASK_METRICS["intent"].details(pairs, "english")
    assert details == {"intent": pytest.approx(200 / 3), "roast": 100, "size": 50}
    assert read_command("{}") == {} and read_command("{1}") is None


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        *((text, "B") for text in ("B", "b", "(b) tea", "B. tea", "The option is B.", "**B**")),
        *(
            (text, "B")
            for text in ("Option: b", "An" + "swer: b", "The correct option is (B)", "choice B")
        ),
        *((text, None) for text in ("", "tea", "42", "beer")),
        ("A tea", "A"),
    ],
)
def test_choices(text, choice):
    assert read_choice(text) == choice


def test_the_interval_covers_the_truth_about_as_often_as_it_tells():
    truth, trials, covered = 0.3, 40, 0
    generator = np.random.default_rng(0)
    for _ in range(trials):
        right = generator.random(100) < truth
        pairs = [("A", "A" if one else "B") for one in right]
        found = estimate(TASK_METRICS["mcq"], pairs, "none")
        covered += found.low <= 100 * truth <= found.high
    assert covered >= 0.8 * trials


def test_a_paired_test_sees_a_small_constant_change_and_no_change():
    generator = np.random.default_rng(1)
    first = [("A", "A" if generator.random() < 0.5 else "B") for _ in range(200)]
    second = [(r, "A") if n % 10 == 0 else (r, h) for n, (r, h) in enumerate(first)]
    found = compare(TASK_METRICS["mcq"], first, second, "none")
    assert found.change.value == pytest.approx(found.second.value - found.first.value)
    assert found.p_value < 0.05 and found.change.low > 0
    same = compare(TASK_METRICS["mcq"], first, list(first), "none")
    assert (same.change.value, same.p_value) == (0, 1)


def test_without_references_there_is_no_value():
    assert str(estimate(TASK_METRICS["wer"], [], "none")) == "n/a"
    assert str(estimate(TASK_METRICS["wer"], [("", "a")], "none")) == "n/a"


def test_the_table_has_the_metrics_that_are_named():
    responses = tuple(
        Response(id=str(n), duration_s=1.0, text=text, pred_text=other)
        for n, (text, other) in enumerate([(json.dumps(ORDER), json.dumps(ORDER))] * 3)
    )
    found = Evaluation(responses=responses, speed=Speed(), metrics=("intent", "wer"))
    lines = table(found.totals()).splitlines()
    assert any(line.split("  ")[0] == "commands accepted" for line in lines)
    assert sum("(95 %: " in line for line in lines) == 2
    assert sum(line.strip().startswith("roast") and "100.00" in line for line in lines) == 1
    alone = Evaluation(responses=responses, speed=Speed())
    (line,) = [line for line in table(alone.totals()).splitlines() if "(95 %: " in line]
    assert line.startswith("WER  ") and line.endswith(" words (95 %: 0.00% to 0.00%)")


def test_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="metrics: 'bleus' is unknown; did you mean bleu"):
        EvalConfig(pretrained_name="a", inputs="b", metrics=("bleus",))


def write(path, rows, **settings):
    lines = [{"id": str(n), "text_raw": r, "pred_text_raw": h} for n, (r, h) in enumerate(rows)]
    record = {"model": {"name": "m", "sha256": "12"}, "settings": settings} if settings else {}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*lines, {"provenance": record}]))
    return str(path)


def test_a_comparison_tells_the_settings_that_differ_and_scores_as_the_evaluations_did(
    tmp_path, capsys
):
    rows = [("twenty people", "20 people")]
    clean = write(tmp_path / "a.jsonl", rows, use_normalizer="basic", noise=None, batch_size=1)
    noisy = write(tmp_path / "b.jsonl", rows, use_normalizer="basic", noise="white", batch_size=2)
    assert evaluate.main(["--compare", clean, noisy]) == 0
    out = capsys.readouterr().out
    assert "\n  noise  None, then white\n" in out and "batch_size" not in out
    assert out.count("  50.00 (95 %") == 2  # `english` would count no error
    assert evaluate.main(["--compare", clean, noisy, "--use-normalizer", "english"]) == 0
    assert "  first   0.00" in capsys.readouterr().out
    other = write(tmp_path / "c.jsonl", rows, use_normalizer=True)
    assert evaluate.main(["--compare", clean, other]) == 2
    assert "use_normalizer=basic, the second with english; choose" in capsys.readouterr().err


def test_two_output_manifests_are_compared(tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", [("a b", "a c")] * 30 + [("d", "d")])
    second = write(tmp_path / "b.jsonl", [("a b", "a b")] * 30 + [("d", "d")])
    assert evaluate.main(["--compare", first, second, "--metrics", "wer,cer"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("31 responses") and out.count("the second is better") == 2
    assert evaluate.main(["--compare", first, second, "--metrics", "wer, cer"]) == 0
    wordless = write(tmp_path / "c.jsonl", [("", "a")])
    assert evaluate.main(["--compare", wordless, wordless]) == 0
    assert "no reference has words" in capsys.readouterr().out
    assert evaluate.main(["--compare", first, first]) == 0
    assert "no difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"pred_text_raw": 5}, "line 1: pred_text_raw must be text, got 5"),
        ({"text_raw": ["a"]}, "line 1: text_raw must be text, got ['a']"),
        ({"nll": "1"}, "line 1: nll must be a number, got '1'"),
        ({"nll": float("nan")}, "line 1: nll must be a number, got nan"),
        ({"tokens": 1.5}, "line 1: tokens must be a count, got 1.5"),
        ({"provenance": 1}, "line 1: provenance must be an object of fields, got 1"),
        ({"provenance": {"settings": 1}}, "line 1: provenance.settings must be an object"),
    ],
)
def test_a_response_of_another_type_is_told_with_its_line(row, told, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    whole = {"id": "0", "text_raw": "a", "pred_text_raw": "a"}
    lines = [whole | row, whole | {"id": "1"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate.main(["--compare", str(path), str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path} {told}" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("a b", "a")], "only 1 in common"),
        ([("a", "a"), ("c", "d")], "the references of '0' differ"),
    ],
)
def test_responses_to_other_references_are_refused(rows, told, tmp_path, capsys):
    first = write(tmp_path / "a.jsonl", [("a b", "a c"), ("c", "d")])
    second = write(tmp_path / "b.jsonl", rows)
    assert evaluate.main(["--compare", first, second]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert evaluate.main(["--compare", first, str(tmp_path / "none.jsonl")]) == 2
    assert evaluate.main(["--compare", first, first, "--metrics", "bluu"]) == 2


def test_three_evaluations_have_a_mean_and_a_spread(tmp_path, capsys):
    right, wrong = ("a b", "a b"), ("a b", "a c")
    files = [
        write(tmp_path / f"{n}.jsonl", [wrong] * n + [right] * (10 - n), seed=n) for n in (2, 4, 6)
    ]
    assert evaluate.main(["--compare", *files]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:5] == ["3", "evaluations", "of", "10", "responses:"]
    assert ["seed", "2,", "then", "4,", "then", "6"] in lines
    assert [line[1] for line in lines if line[0] in files] == ["10.00", "20.00", "30.00"]
    assert " ".join(lines[-1]) == "mean 20.00, standard deviation 10.00, from 10.00 to 30.00"
    other = write(tmp_path / "other.jsonl", [wrong] * 9)
    assert evaluate.main(["--compare", *files, other]) == 2
    assert "10 and 9 responses with a reference" in capsys.readouterr().err
    assert evaluate.main(["--compare", files[0]]) == 2
    assert "takes two or more evaluations" in capsys.readouterr().err
