"""`speechlm2-jax runs`: what run directories hold, as a table and as a page of curves."""

import json
from pathlib import Path

import fsspec
import pytest

from speechlm2_jax.commands.runs import main
from speechlm2_jax.inspection.runs import find_runs, more_is_better, short_names, table
from speechlm2_jax.inspection.runs_page import MOST_POINTS, thin, write_runs_page
from speechlm2_jax.object_store.folders import CACHE_VARIABLE


def write(run, rows, *, is_finished=False, max_steps=20):
    run.mkdir(parents=True)
    lines = [json.dumps(row) for row in rows]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "lo')
    (run / "config.yaml").write_text(f"trainer:\n  max_steps: {max_steps}\n")
    if is_finished:
        (run / "FINISHED").touch()
    return run


@pytest.fixture
def two_runs(tmp_path):
    steps = [{"step": n, "loss": 4.0 / n, "acc": n / 10, "mfu": None} for n in range(1, 6)]
    scores = [{"step": n, "val_wer": v, "val_acc": v} for n, v in ((2, 0.5), (4, 0.2), (5, 0.3))]
    time = {"step": 5, "time_total_s": 1800.0, "time_compute_s": 9.0, "goodput": 0.5}
    one = write(tmp_path / "runs" / "one", [*steps, *scores, time, time], is_finished=True)
    other = write(tmp_path / "runs" / "deep" / "two", [{"step": 3, "loss": float("nan")}, steps[2]])
    return one, other


def test_the_table_has_state_last_loss_and_best_scores(two_runs, tmp_path):
    head, *rows = table(find_runs([tmp_path / "runs"]))
    assert head == ["run", "state", "hours", "loss", "best val_wer", "best val_acc"]
    assert sorted(rows) == [
        ["deep/two", "step 3 of 20", "–", "1.333", "–", "–"],
        ["one", "finished", "1.00", "0.8", "0.2", "0.5"],
    ]


def test_a_run_directory_itself_is_taken_once(two_runs):
    one, other = two_runs
    assert [run.path for run in find_runs([one, one])] == [one]
    assert short_names(find_runs([one])) == {one: "one"}
    assert {run.path for run in find_runs([one, other])} == {one, other}


def test_more_is_better_of_scores_and_speeds_and_less_of_losses_and_errors():
    rising = ("val_acc", "val_txt_bleu", "tokens_per_s_per_device", "val_turn_taking_recall")
    rising += ("val_barge_in_success", "val_audio_token_acc_of_silence", "val_acc_wer", "text_acc")
    assert all(map(more_is_better, rising))
    assert not any(map(more_is_better, ("loss", "val_wer", "val_cer_clean", "step_time_s")))


@pytest.mark.parametrize("name", ["edacc", "accents", "acc", "f1", "a_recall", "bleu_1"])
def test_the_name_of_a_validation_set_does_not_decide_what_is_best(tmp_path, name):
    rows = [{"step": n, "val_wer": v, f"val_wer_{name}": v} for n, v in ((1, 0.2), (2, 0.9))]
    (run,) = find_runs([write(tmp_path / "run", rows)])
    assert run.best(f"val_wer_{name}") == run.best("val_wer") == 0.2


def test_validation_metrics_that_do_not_fit_are_named(tmp_path, capsys):
    names = [f"val_wer_{letter}" for letter in "abcde"]
    run = write(tmp_path / "run", [{"step": 1, "val_wer": 0.3, **dict.fromkeys(names, 0.3)}])
    main([str(run), "--html", str(tmp_path / "page.html")])
    head, _, left_out, _ = capsys.readouterr().out.splitlines()
    assert head.count("best ") == 4 and "val_wer_c" in head and "val_wer_d" not in head
    assert left_out == "not in this table: val_wer_d, val_wer_e  (--html FILE shows all)"
    assert "best val_wer_e" in (tmp_path / "page.html").read_text()


def test_runs_at_addresses_are_shown_by_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    try:
        for run, loss in (("one", 1.0), ("two", 2.0)):
            files.pipe_file(f"/b/runs/{run}/metrics.jsonl", b'{"step": 3, "loss": %.1f}\n' % loss)
        files.pipe_file("/b/runs/two/FINISHED", b"{}")
        main(["memory://b/runs/"])
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        assert sorted(rows) == [["one", "step", "3", "–", "1"], ["two", "finished", "–", "2"]]
        files.rm_file("/b/runs/two/FINISHED")
        main(["memory://b/runs/two"])
        assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["two", "step", "3"]
        with pytest.raises(SystemExit, match="2"):
            main(["memory://b/none"])
        assert "memory://b/none: no run there" in capsys.readouterr().err
    finally:
        files.store.clear()


def test_long_curves_are_thinned_to_means():
    curve = [(n, float(n % 2)) for n in range(10 * MOST_POINTS)]
    thinned = thin(curve)
    assert len(thinned) == MOST_POINTS and {value for _, value in thinned} == {0.5}
    assert thin(curve[:9]) == curve[:9]


def test_the_page_has_a_chart_of_every_metric_and_a_curve_of_every_run_that_has_it(
    two_runs, tmp_path
):
    page = tmp_path / "page.html"
    write_runs_page(page, find_runs([tmp_path / "runs"]))
    text = page.read_text()
    charts = dict(
        part.split("</h2>", 1)
        for part in text.split("<h2>")[1:]  # name, chart
    )
    curves = {name: chart.count("<polyline") for name, chart in charts.items()}
    assert curves == {"loss": 2, "val_wer": 1, "val_acc": 1, "acc": 2}
    assert "<title>one: last 0.8</title>" in charts["loss"]
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")


def test_names_of_runs_are_escaped(tmp_path):
    run = write(tmp_path / "a<b>&'c", [{"step": 1, "loss": 1.0}])
    page = tmp_path / "page.html"
    write_runs_page(page, find_runs([run]))
    assert "<b>" not in page.read_text() and "a&lt;b&gt;" in page.read_text()


def test_the_command_prints_the_table_and_writes_the_page(two_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--html", "page.html"])
    head, first, second, last = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "state"] and len(head) == len(first) == len(second)
    assert last.startswith("page: page.html") and Path("page.html").is_file()
    with pytest.raises(SystemExit, match="2"):
        main(["nowhere"])
    assert capsys.readouterr().err == "speechlm2-jax runs: nowhere: no such folder\n"
    Path("empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main(["empty"])
    assert "no run there" in capsys.readouterr().err


def test_damaged_lines_and_a_loss_that_is_not_finite_are_told(tmp_path, capsys):
    run = write(tmp_path / "runs" / "a", [])
    lines = [b'{"step": 1, "loss": 3.0}', b"\xff\xfe\x00", b'{"step": 2, "loss": 2.0, "x": 1%s}']
    lines[2] %= b"0" * 400
    lines += [b"[1]", b'{"step": 3, "loss": NaN, "time_total_s": "?"}', b'{"step": 4, "val_']
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    main([str(run)])
    told = capsys.readouterr().out
    assert "step 2 of 20, loss is not finite" in told
    assert "metrics.jsonl: 2 damaged lines are left out" in told


def test_a_damaged_run_is_named_and_the_others_are_shown(tmp_path, capsys):
    write(tmp_path / "runs" / "fine", [{"step": 3, "loss": 2.0}])
    bad = write(tmp_path / "runs" / "bad", [{"step": 4, "loss": 2.0}])
    (bad / "config.yaml").write_bytes(b"\xff\xfe\xfa")
    steps = [True, -1, 10**400, "[" * 100_000, '1, "val_\\ud800": 1']
    lines = [f'{{"step": {str(step).lower()}, "loss": 1}}\n' for step in steps]
    with (bad / "metrics.jsonl").open("w") as file:
        file.write("".join([*lines, '{"step": 5, "loss": 1e308}\n{"step": 6, "loss": -1e308}\n']))
    (tmp_path / "runs" / "no_run" / "metrics.jsonl").mkdir(parents=True)
    main([str(tmp_path / "runs"), "--html", str(tmp_path / "page.html")])
    told = capsys.readouterr().out
    assert "fine  step 3 of 20" in told and "bad   step 6 " in told and "no_run" not in told
    assert f"{bad / 'config.yaml'}: cannot be read ('utf-8' codec" in told
    assert "metrics.jsonl: 5 damaged lines are left out" in told
    assert "inf" not in (tmp_path / "page.html").read_text().partition("<body>")[2]
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "runs"), "--html", str(tmp_path)])
    assert "is a folder; name a file" in capsys.readouterr().err
