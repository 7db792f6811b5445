"""The page of a run's data: its figures, its prompts, and its players."""

import json
import re

import numpy as np
import pytest
import soundfile

import speechlm2_jax as slm
from speechlm2_jax import experiment
from speechlm2_jax.data import inspect, plan
from speechlm2_jax.inspection import facts
from speechlm2_jax.inspection.page import write_page
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.test_stream_faults import write_shards

TAG = "<|audioplaceholder|>"


@pytest.fixture(params=["in memory", "indexed"])
def datamodule(tmp_path, request, monkeypatch):
    """Three recordings of 0.5, 1 and 2 s; two of them in a batch."""
    if request.param == "indexed":
        monkeypatch.setattr("speechlm2_jax.data.index.row_count.LARGE_ROWS", 1)
    rows = []
    for number, seconds in enumerate((0.5, 1.0, 2.0)):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, np.sin(np.arange(int(16000 * seconds)) / 9) / 4, 16000)
        rows.append({"audio_filepath": str(path), "duration": seconds, "text": "x" * 3 * number})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = slm.data.Tokenizer("tests/data/llm/qwen3")
    tokenizer.add_special_tokens([TAG])
    module = slm.data.DataModule(
        {
            "train_ds": {
                "manifest_filepath": str(tmp_path / "m.jsonl"),
                "audio_locator_tag": TAG,
                "prompt_format": "qwen",
                "token_equivalent_duration": 0.08,
                "batch_size": 2,
            }
        },
        tokenizer=tokenizer,
        dataset=slm.data.SALMDataset(tokenizer=tokenizer),
    )
    module.setup(frame_count=lambda samples: samples // 1280)
    return module, tokenizer


def test_padding_is_what_the_shapes_hold_beyond_the_data(datamodule):
    module, _ = datamodule
    prepared = module.prepared()
    found = facts.padding(prepared, facts.planned_batches(module, "train_ds"))
    shape = prepared.sampler.plan.buckets[0].shape
    places = 2 * found.batches * shape.tokens  # one bucket of two rows
    assert len(prepared.sampler.plan.buckets) == 1 and found.batches == 2
    used = sum(
        len(c.prompt.input_ids) - 2 + c.clips[0].samples(16000) // 1280
        for c in prepared.conversations
    )
    np.testing.assert_allclose(found.positions, 1 - used / places)
    np.testing.assert_allclose(found.audio, 1 - 3.5 * 16000 / (4 * shape.samples))


def test_pieces_are_the_tokens_and_their_loss_mask(datamodule):
    module, tokenizer = datamodule
    conversation = module.prepared().conversations[1]
    pieces = facts.pieces(conversation, tokenizer)
    assert [p.is_trained for p in pieces] == conversation.prompt.mask.tolist()
    text = "".join(p.text for p in pieces).replace(f" {TAG} ", TAG)
    assert text == tokenizer.ids_to_text(conversation.prompt.input_ids, False)
    trained = "".join(p.text for p in pieces if p.is_trained)
    assert "xxx" in trained and TAG not in trained


def test_the_page_shows_every_conversation_with_a_player(datamodule, tmp_path):
    module, tokenizer = datamodule
    write_page(tmp_path / "page.html", module, tokenizer, title="<mine>")
    html = (tmp_path / "page.html").read_text()
    assert html.count("<audio ") == html.count('<li class="row"') == 3
    assert "&lt;mine&gt;" in html and "<mine>" not in html
    assert re.search(r'<span class="on">x+<', html)
    assert not re.search(r'(src|href)="(?!data:)', html)  # nothing from outside


def test_a_wrong_configuration_is_one_line(capsys):
    with pytest.raises(SystemExit) as raised:
        inspect.main(["nothing_of_this_name"])
    assert raised.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("program", [inspect, plan])
def test_ctrl_c_is_one_line_that_names_what_is_kept(program, monkeypatch, capsys):
    def interrupt(*arguments, **keys):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "read_run", interrupt)
    with pytest.raises(SystemExit) as stopped:
        program.main(["salm"])
    assert stopped.value.code == 130
    line = capsys.readouterr().err
    assert line.startswith(f"{program.PROGRAM}: interrupted; chunks of indexes")
    assert line.endswith("are kept, and the same command resumes\n") and line.count("\n") == 1


@pytest.mark.parametrize("program", [inspect, plan])
def test_later_files_of_settings_go_over_the_first(program, monkeypatch):
    def read_run(config, overrides, *, over):
        assert (config, overrides, over) == ("salm", ["a=1"], ("more.yaml", "last.yaml"))
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "read_run", read_run)
    more = ["--config", "more.yaml", "--config", "last.yaml", "a=1"]
    for argv in (["salm", *more], ["--config", "salm", *more]):
        with pytest.raises(SystemExit) as stopped:
            program.main(argv)
        assert stopped.value.code == 130


def test_a_stream_is_refused_unless_it_is_read_at_random(tmp_path):
    write_shards(tmp_path, 2, 2)
    tokenizer = slm.data.Tokenizer("tests/data/llm/qwen3")
    tokenizer.add_special_tokens([TAG])
    keys = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 2}
    one = {"type": "nemo_tarred", "audio_locator_tag": TAG}
    one["manifest_filepath"] = str(tmp_path / "manifest_{0..1}.jsonl")
    one["tarred_audio_filepaths"] = str(tmp_path / "audio_{0..1}.tar")

    def write(is_stream):
        train = {**keys, "stream": is_stream, "input_cfg": [one]}
        module = slm.data.DataModule({"train_ds": train}, tokenizer=tokenizer)
        module.setup(frame_count=lambda samples: samples // 1280)
        write_page(tmp_path / "page.html", module, tokenizer, title="tars")

    with pytest.raises(SettingsError, match=r"data\.train_ds: a stream has no plan.*stream: false"):
        write(is_stream=True)
    write(is_stream=False)
    assert (tmp_path / "page.html").read_text().count("<audio ") == 4
