"""`align`: rows keep their order and keys, a stopped run resumes, and what fails is told."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.alignment import manifests
from speechlm2_jax.alignment.manifests import align_manifest, sample_problems
from speechlm2_jax.commands import align
from speechlm2_jax.inference.timestamps.aligner import AlignedLabels
from speechlm2_jax.inference.timestamps.bounds import CTC_TIMING, TimedLabel
from speechlm2_jax.settings import SettingsError

RATE_HZ = 16000


class Evenly:
    """An aligner that gives each word a label, evenly spaced; the word "never" does not fit."""

    sampling_rate, frame_s, timing = RATE_HZ, 0.08, CTC_TIMING

    def __init__(self):
        self.seen = []

    def align(self, waves, words):
        self.seen += [(len(wave), own) for wave, own in zip(waves, words, strict=True)]
        return [self._align(len(w) / RATE_HZ, own) for w, own in zip(waves, words, strict=True)]

    def _align(self, seconds, words):
        if "never" in words:
            labels = [TimedLabel(n, 4, None) for n in range(len(words))]
            return AlignedLabels(tuple(labels), (None,) * len(words), None, "does not fit")
        step = seconds / len(words)
        labels = [TimedLabel(n, 4, (n * step, (n + 1) * step)) for n in range(len(words))]
        return AlignedLabels(tuple(labels), (-0.1,) * len(words), -0.5)


@pytest.fixture
def manifest(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(5):
        soundfile.write(tmp_path / f"{n}.wav", rng.normal(size=RATE_HZ * 2) * 0.1, RATE_HZ)
        rows.append({"audio_filepath": f"{n}.wav", "duration": 2.0, "text": f"word {n}", "id": n})
    rows[1] |= {"text": "never", "words": ["old"]}
    rows[2] |= {"offset": 0.5, "duration": 1.0}
    rows[3] |= {"audio_filepath": "missing.wav", "words": ["old"]}
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rows_get_words_and_what_fails_is_told(manifest):
    aligner = Evenly()
    totals = align_manifest(manifest, aligner)
    rows = rows_of(manifest.with_name("test_words.jsonl"))
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
    assert [word["word"] for word in rows[0]["words"]] == ["word", "0"]
    flat = [t for word in rows[0]["words"] for t in (word["start"], word["end"])]
    assert flat == sorted(flat) and flat[-1] <= 2.0 and rows[0]["alignment_score"] == -0.5
    assert (RATE_HZ, ["word", "2"]) in aligner.seen, "the stretch alone is aligned"
    assert rows[1]["alignment_problem"] == "does not fit" and "words" not in rows[1]
    assert "no such file" in rows[3]["alignment_problem"] and "words" not in rows[3]
    assert not any("alignment_model" in row for row in rows)
    assert [name for name, _ in totals.problems] == ["1.wav", "missing.wav"]
    assert totals.rows == 5 and totals.audio_s == pytest.approx(7.0)
    assert list(sample_problems(totals, most=1))[-1].startswith("... and 1 more")


def test_a_stopped_run_resumes_after_its_last_whole_line(manifest, monkeypatch):
    monkeypatch.setattr(manifests, "ROWS_AT_ONCE", 2)
    align_manifest(manifest, Evenly())
    target = manifest.with_name("test_words.jsonl")
    whole = target.read_bytes()
    lines = whole.splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:3]) + lines[3][:10])
    aligner, reported = Evenly(), []
    totals = align_manifest(manifest, aligner, report=lambda *x: reported.append(x))
    assert target.read_bytes() == whole and len(aligner.seen) == 1
    assert (totals.resumed, totals.rows, len(totals.problems)) == (3, 5, 2)
    assert reported == [(3, 5), (5, 5)]


def test_paths_are_right_from_another_folder(manifest, tmp_path):
    target = tmp_path / "timed" / "out.jsonl"
    align_manifest(manifest, Evenly(), target)
    assert Path(rows_of(target)[0]["audio_filepath"]) == tmp_path / "0.wav"
    assert align_manifest(manifest, Evenly(), target).resumed == 5


def test_rows_are_found_as_in_training(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "linked.wav").symlink_to("0.wav")
    link, remote = tmp_path / "linked.wav", "memory://bucket/a.wav"
    names = ["linked.wav", str(link), link.as_uri(), remote]
    other = tmp_path / "lists" / "a.jsonl"
    lines = [json.dumps({"audio_filepath": name, "text": "word"}) for name in names]
    other.write_text("\n".join(lines))
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe_file("/bucket/a.wav", (tmp_path / "0.wav").read_bytes())
    totals = align_manifest(other, Evenly(), tmp_path / "timed" / "a.jsonl")
    assert totals.problems == () and totals.audio_s == 8.0
    written = [row["audio_filepath"] for row in rows_of(totals.output)]
    assert written == [str(link)] * 3 + [remote]
    assert align_manifest(other, Evenly(), totals.output).resumed == 4
    other.write_text('{"audio_filepath": "pipe:cat a.wav", "text": "a"}')
    with pytest.raises(SettingsError, match="a.jsonl line 1: pipe:cat a.wav is not on this"):
        align_manifest(other, Evenly())


def test_recordings_that_could_not_be_read_are_tried_again(manifest, tmp_path):
    align_manifest(manifest, Evenly())
    (tmp_path / "missing.wav").write_bytes((tmp_path / "0.wav").read_bytes())
    aligner = Evenly()
    totals = align_manifest(manifest, aligner)
    rows = rows_of(totals.output)
    assert [own for _, own in aligner.seen] == [["word", "3"]]
    assert [name for name, _ in totals.problems] == ["1.wav"] and totals.rows == 5
    assert "alignment_problem" not in rows[3] and len(rows[3]["words"]) == 2
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("key", "value"), [("offset", 0.25), ("duration", 1.5), ("text", "new")])
def test_a_changed_row_or_aligner_does_not_resume(key, value, manifest):
    align_manifest(manifest, Evenly(), model="one.nemo")
    assert rows_of(manifest.with_name("test_words.jsonl"))[0]["alignment_model"] == "one.nemo"
    with pytest.raises(SettingsError, match=r"rows that one\.nemo aligned"):
        align_manifest(manifest, Evenly(), model="two.nemo")
    rows = rows_of(manifest)
    rows[2][key] = value
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SettingsError, match="rows of another manifest"):
        align_manifest(manifest, Evenly(), model="one.nemo")


def test_the_aligner_is_opened_once_the_manifest_is_read(manifest, tmp_path):
    def fails():
        raise SettingsError("no such model")

    with pytest.raises(SettingsError, match="nowhere.jsonl: no such file"):
        align_manifest(tmp_path / "nowhere.jsonl", fails)
    with pytest.raises(SettingsError, match=r"0\.wav: cannot be written .* folder with --output"):
        align_manifest(manifest, fails, tmp_path / "0.wav" / "out.jsonl")
    target = align_manifest(manifest, lambda: Evenly()).output
    with pytest.raises(SettingsError, match="no such model"):
        align_manifest(manifest, fails, overwrite=True)
    assert len(rows_of(target)) == 5, "what is there is replaced only if there is an aligner"


def test_other_rows_and_bad_lines_are_refused(manifest, tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text('{"audio_filepath": "x.wav", "text": "other"}\n')
    with pytest.raises(SettingsError, match="has rows of another manifest"):
        align_manifest(manifest, Evenly(), target)
    assert align_manifest(manifest, Evenly(), target, overwrite=True).rows == 5
    with pytest.raises(SettingsError, match="is the manifest itself"):
        align_manifest(manifest, Evenly(), manifest)
    row = '{"audio_filepath": "a.wav", "text": "a", %s}'
    for line, message in (
        (
            '{"text": "a"}',
            'bad.jsonl line 1: expected a JSON object with a text in "audio_filepath"',
        ),
        (row % '"offset": "1"', "bad.jsonl line 1: offset must be seconds, got '1'"),
        (row % '"offset": true', "offset must be seconds, got True"),
        (row % '"offset": -1', "offset must be seconds, from 0"),
        (row % '"offset": 1e308', "offset must be seconds, from 0"),
        (row % '"duration": NaN', "duration must be seconds, from 0"),
        ("{", "bad.jsonl line 1: "),
        ("", "has no rows"),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(line)
        with pytest.raises(SettingsError, match=message):
            align_manifest(bad, Evenly())


def test_one_run_at_a_time_writes_an_output(manifest, tmp_path):
    target = tmp_path / "out.jsonl"
    held = []

    def second():
        with pytest.raises(SettingsError, match=r"another run is writing .*out\.jsonl"):
            align_manifest(manifest, Evenly(), target, overwrite=True)
        held.append(sorted(path.name for path in tmp_path.glob(".*")))
        return Evenly()

    assert align_manifest(manifest, second, target).rows == 5
    assert held == [[".out.jsonl.lock"]] and not [*tmp_path.glob(".*")]
    assert align_manifest(manifest, Evenly(), target).resumed == 5
    with pytest.raises(SettingsError, match="is a folder; name a file"):
        align_manifest(manifest, Evenly(), tmp_path)


def test_a_byte_order_mark_and_line_separators_in_a_text_are_read(manifest, tmp_path):
    first = json.loads(manifest.read_text().split("\n")[0]) | {"text": "one\u2028two"}
    marked = manifest.with_name("marked.jsonl")
    marked.write_text("\ufeff" + json.dumps(first, ensure_ascii=False) + "\n", encoding="utf-8")
    target = tmp_path / "marked_words.jsonl"
    assert align_manifest(marked, Evenly(), target).rows == 1
    assert align_manifest(marked, Evenly(), target).resumed == 1


def test_the_command_tells_what_it_did(manifest, monkeypatch, capsys):
    monkeypatch.setattr("speechlm2_jax.models.aligners.open_aligner", lambda *a, **k: Evenly())
    monkeypatch.setattr("speechlm2_jax.compilation_cache.keep_compiled_programs", lambda *a: None)
    assert align.main([str(manifest), "--aligner", "x.nemo"]) == 1
    printed = capsys.readouterr()
    assert "test_words.jsonl: 5 rows, 7 s of audio" in printed.out
    assert "2 rows could not be aligned:" in printed.out and "1.wav: does not fit" in printed.out
    with pytest.raises(SystemExit) as stop:
        align.main([str(manifest.with_name("nowhere.jsonl"))])
    assert stop.value.code == 2 and "nowhere.jsonl" in capsys.readouterr().err
