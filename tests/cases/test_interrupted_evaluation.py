"""An interrupted evaluation keeps its responses, and the same command resumes it."""

import errno
import io
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

import evaluate as program
from speechlm2_jax import models
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.duplex.results import DialogueResult
from speechlm2_jax.evaluation.duplex.turns import SpokenWord, TranscribedTurn
from speechlm2_jax.evaluation.exit_codes import interruptible, report_interruption
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.journal import Journal, row_keys
from speechlm2_jax.evaluation.metrics.token_accuracy import TokenCounts
from speechlm2_jax.evaluation.metrics.turn_taking import TurnMark, Turns
from speechlm2_jax.evaluation.progress import ProgressDisplay
from speechlm2_jax.evaluation.run import evaluate, input_keys
from speechlm2_jax.settings import SettingsError, build, to_plain
from tests.evaluation.fake_model import FakeModel

DATA = Path(__file__).parents[1] / "data"
CONFIG = EvalConfig(
    pretrained_name="m",
    inputs="i",
    batch_size=2,
    verbose=False,
    extra_eos_tokens=("<extra>",),
    use_normalizer="none",
)
SECONDS = [1, 5, 2, 4, 3, 1, 1, 2]


def utterances(bad=()):
    """Eight recordings of two names in turn, which are told apart by their files."""

    def one(n, seconds):
        def read(rate_hz):
            if n in bad:
                raise AudioError("no such file", cause="missing")
            return np.zeros(seconds * rate_hz, np.float32)

        source = f"spk{n}/001.wav"
        name = f"00{n % 2}"
        return Utterance(id=name, duration_s=float(seconds), text="one", read=read, source=source)

    return [one(n, seconds) for n, seconds in enumerate(SECONDS)]


class Interrupted(FakeModel):
    """Is interrupted at its third batch."""

    def generate(self, prompts, **options):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return super().generate(prompts, **options)


def run(path, model, config=CONFIG, settings=None, bad=()):
    """One evaluation; gives its journal and, where it came to an end, the rows."""
    given = utterances(bad)
    with Journal(path, settings or {"max_new_tokens": 4}, input_keys(given)) as journal:
        result = evaluate(model, given, config, lambda line: None, journal)
        journal.finish(result.rows(), {"totals": result.totals()})
    return journal


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def interrupt(path, **options):
    with pytest.raises(KeyboardInterrupt) as stop:
        run(path, Interrupted(), **options)
    return stop.value


def test_the_rest_is_generated_and_no_row_twice(tmp_path):
    run(tmp_path / "whole.jsonl", FakeModel())
    path = tmp_path / "out.jsonl"
    stop = interrupt(path)
    assert stop.__notes__ == [
        f"4 of 8 responses are in {path}; run the same command again to resume"
    ]
    header, *kept = rows_of(path)
    assert header["evaluation"]["inputs"] == 8
    assert [row["pred_text"] for row in kept] == ["five", "four", "three", "two"]
    with path.open("ab") as file:  # killed while it wrote
        file.write(b'{"id": "000", "pred_te')
    model = FakeModel()
    journal = run(path, model)
    assert journal.note == f"4 of 8 responses are in {path} already"
    assert sum(len(call["audio_lens"]) for call in model.calls) == 4
    *rows, last = rows_of(path)
    *expected, other = rows_of(tmp_path / "whole.jsonl")
    assert rows == expected and len(rows) == 8
    totals, whole = last["provenance"]["totals"], other["provenance"]["totals"]
    assert (totals["audio_s"], totals["wer"]) == (whole["audio_s"], whole["wer"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def test_keys_of_rows_do_not_depend_on_their_order():
    keys = input_keys(utterances())
    assert len(set(keys)) == 8
    assert set(input_keys(utterances()[::-1])) == set(keys)
    assert row_keys([("a",), ("a",), ("b",)])[:2] != ["a", "a"]
    assert len(set(row_keys([("a",)] * 3))) == 3


def test_what_could_not_be_read_is_tried_again(tmp_path):
    path = tmp_path / "out.jsonl"
    interrupt(path, bad=(1,))
    assert "error" in rows_of(path)[1]
    run(path, FakeModel())
    assert [row["pred_text"] for row in rows_of(path)[:-1]].count("five") == 1


def test_other_settings_start_again_and_lose_nothing(tmp_path):
    path = tmp_path / "out.jsonl"
    interrupt(path)
    journal = run(path, model := FakeModel(), settings={"max_new_tokens": 8})
    assert "other settings (max_new_tokens: 4, now 8); it is kept as out.jsonl.unfinished" in str(
        journal.note
    )
    assert len(model.calls) == 4 and len(rows_of(path)) == 9
    assert len(rows_of(tmp_path / "out.jsonl.unfinished")) == 5


def test_a_finished_file_stays_until_the_new_one_is_finished(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, FakeModel())
    before = path.read_bytes()
    interrupt(path)
    assert (tmp_path / "out.jsonl.previous").read_bytes() == before
    run(path, FakeModel())
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_one_evaluation_writes_a_file(tmp_path):
    path = tmp_path / "out.jsonl"
    interrupt(path)
    with (
        Journal(path, {"max_new_tokens": 4}, input_keys(utterances())),
        pytest.raises(SettingsError, match="another evaluation is writing .*; name another file"),
    ):
        run(path, FakeModel())


class FullDisk:
    """A file that takes half of a write and then no more."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_with_what_is_kept(tmp_path):
    path, keys = tmp_path / "out.jsonl", input_keys(utterances())

    def fill(journal):
        with journal:
            journal.append({0: ({"id": "a"}, {})})
            journal._file = FullDisk(journal._file)
            journal.append({1: ({"id": "b"}, {})})

    with pytest.raises(SettingsError, match=r"output_manifest: .*out.jsonl: No space left") as full:
        fill(Journal(path, {}, keys))
    assert full.value.__notes__[0].startswith("1 of 8 responses are in")
    assert [row.get("id") for row in rows_of(path)] == [None, "a"], "whole lines only"


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A command line over three recordings, and a model that is interrupted at the third."""
    for n in range(3):
        soundfile.write(tmp_path / f"{n}.wav", np.zeros(16_000 * (3 - n), np.float32), 16_000)
    made = []

    class Fake:
        @staticmethod
        def from_pretrained(name, *, dtype, **placed):
            made.append(Interrupted() if not made else FakeModel())
            return made[-1]

    monkeypatch.setitem(vars(models), "SALM", Fake)
    monkeypatch.chdir(tmp_path)
    Path("model").write_text("weights")
    yield ["pretrained_name=model", f"inputs={tmp_path}", "batch_size=1", "device=cpu:0",
           "output_manifest=out.jsonl"]  # fmt: skip
    jax.config.update("jax_default_device", None)


def test_ctrl_c_is_one_line_and_the_same_command_resumes(command, capsys):
    assert program.main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "evaluate.py: interrupted; 2 of 3 responses are in out.jsonl; run the same command again "
        "to resume"
    )
    assert program.main([*command, "use_normalizer=none"]) == 0  # does not change responses
    assert "2 of 3 responses are in out.jsonl already" in capsys.readouterr().out
    assert [row["id"] for row in rows_of(Path("out.jsonl"))[:-1]] == ["0.wav", "1.wav", "2.wav"]


def test_without_a_manifest_an_interruption_is_one_line_too(command, capsys):
    assert program.main([*command[:-1], "output_manifest=null"]) == 130
    assert capsys.readouterr().err.endswith("evaluate.py: interrupted; nothing is kept\n")


def test_sigterm_ends_with_its_own_code(capsys):
    with pytest.raises(KeyboardInterrupt) as stop, interruptible():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
    assert report_interruption("evaluate.py", stop.value) == 143
    assert capsys.readouterr().err == "evaluate.py: terminated; nothing is kept\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("name", ["m.jsonl", "/dev/null"])
def test_outputs_that_would_destroy_something_are_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", np.zeros(16_000), 16_000)
    Path("m.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1.0, "text": "a"}\n')
    argv = ["pretrained_name=m", "inputs=m.jsonl", f"output_manifest={name}"]
    assert program.main(argv) == 2
    assert f"output_manifest: {name} is" in capsys.readouterr().err


def test_sampled_responses_do_not_depend_on_what_was_generated_before():
    model = models.SALM.from_pretrained(DATA / "salm" / "llama_adapter_hf").eval()
    prompts = [[{"role": "user", "content": text}] for text in ("What?", "Yes", "No")]
    drawn = dict(do_sample=True, max_new_tokens=8, seed=3, temperature=2.0)
    whole = model.generate(prompts, **drawn)[:, -8:]
    rest = model.generate(prompts[1:], **drawn, draw_numbers=[1, 2])[:, -8:]
    np.testing.assert_array_equal(rest, whole[1:])
    each = model.generate_each(prompts[1:], **drawn, slots=2, draw_numbers=iter([1, 2]))
    for number, ids in (one for round in each for one in round):
        np.testing.assert_array_equal(ids, whole[1 + number, : len(ids)])
    with pytest.raises(ValueError, match="2 draw_numbers for 3 prompts"):
        model.generate(prompts, **drawn, draw_numbers=[0, 1])


def test_an_evaluation_seeds_sampling_by_the_rank_of_a_recording():
    class Drawing(FakeModel):
        def generate_each(self, prompts, *, draw_numbers, **options):
            for number, (prompt, draw) in enumerate(zip(prompts, draw_numbers, strict=False)):
                drawn.append(draw)
                (wave,) = prompt[-1]["audio"]
                yield [(number, self.generate([], audio_lens=np.array([len(wave)]))[0])]

    config = replace(CONFIG, generation={"do_sample": True})
    drawn: list[int] = []
    evaluate(Drawing(), utterances(bad=(1,)), config, lambda line: None)
    assert drawn == [1, 2, 3, 4, 5, 6, 7], "the longest could not be read"


def test_what_scores_depend_on_survives_a_line_of_json():
    result = DialogueResult(
        id="c",
        set_name="dialogs",
        duration_s=2.5,
        user_text="hi",
        text="yes",
        pred_text="yes sure",
        asr_text="yes",
        agent_turns=(
            TranscribedTurn(start_s=0.08, end_s=1.2, words=(SpokenWord(start_s=0.1, text="yes"),)),
        ),
        marks=(TurnMark(kind="response", start_s=1.0, end_s=1.1),),
        counts=TokenCounts(text=3, text_right=2),
        rtf=0.3,
    )
    assert build(DialogueResult, json.loads(json.dumps(to_plain(result)))) == result
    turns = Turns.from_segments([(0.08, 1.1), (2.0, 3.3)])
    again = Turns.from_segments(map(tuple, json.loads(json.dumps(turns.segments()))))
    assert again.segments() == turns.segments()


def test_a_pipe_gets_lines_and_a_terminal_a_bar():
    now_s, pipe = 0.0, io.StringIO()
    with ProgressDisplay(1000, 100, stream=pipe, clock=lambda: now_s) as progress:
        for _ in range(90):
            now_s += 1.0
            progress.update(10)
    lines = pipe.getvalue().splitlines()
    assert "\r" not in pipe.getvalue()
    assert lines[0] == "generated 150 of 1000 (15%), 10.0 a second, 1 min 25 s left"
    assert len(lines) == 12, "every 5 s for a minute, then every 30 s"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    with ProgressDisplay(10, stream=terminal) as progress:
        progress.update(10)
    assert "\r" in terminal.getvalue() and "10/10" in terminal.getvalue()
    assert sys.stderr is not terminal
