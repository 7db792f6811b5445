"""Invariants of the stream: exact resume, bad audio masked and counted, shapes of the plan only."""

import json
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data import DataModule
from speechlm2_jax.settings import SettingsError, ignored_report
from tests.data_pipeline.small_corpus import (
    TAG,
    assert_same,
    frames,
    read_rows,
    write_manifest,
)

DURATION_S = 0.5


def shape_of(batch):
    return (*batch.arrays.tokens.shape, *batch.arrays.audio.shape)


@pytest.fixture(scope="module")
def uninterrupted(corpus, make_module):
    stream = make_module(corpus / "manifest.jsonl", groups=2).train_batches()
    batches, states = [], [stream.get_state()]
    for batch in islice(stream, 13):  # three epochs and a bit
        batches.append(batch)
        states.append(json.loads(json.dumps(stream.get_state())))
    return batches, states


def test_the_stream_goes_through_all_conversations_epoch_after_epoch(uninterrupted):
    batches, states = uninterrupted
    for epoch in range(3):
        ids = [
            i
            for b, s in zip(batches, states[1:], strict=True)
            if s["epoch"] == epoch
            for i in b.ids
        ]
        assert sorted(ids) == [f"clip{n:02d}" for n in range(30)]
    assert states[-1]["epoch"] == 3


@pytest.mark.parametrize("threads", [0, 4])
def test_threads_change_nothing(threads, corpus, make_module, uninterrupted):
    module = make_module(corpus / "manifest.jsonl", groups=2, num_workers=threads)
    for batch, expected in zip(module.train_batches(), uninterrupted[0], strict=False):
        assert_same(batch, expected)


def test_resuming_anywhere_gives_the_rest_of_the_run(corpus, make_module, uninterrupted):
    batches, states = uninterrupted
    module = make_module(corpus / "manifest.jsonl", groups=2)
    for k in range(len(batches)):
        stream = module.train_batches(states[k])
        assert stream.get_state() == states[k]
        for batch, expected in zip(islice(stream, 2), batches[k : k + 2], strict=False):
            assert_same(batch, expected)
        stream.close()
    stream = module.train_batches()
    next(stream)
    stream.set_state(states[5])
    assert_same(next(stream), batches[5])


def test_a_state_is_small_and_holds_position_and_number_of_groups(uninterrupted):
    state = uninterrupted[1][3]
    assert len(json.dumps(state)) < 200
    assert (state["epoch"], state["position"], state["groups"]) == (0, 3, 2)


def test_groups_stay_when_the_mesh_changes(corpus, make_module, uninterrupted):
    batches, states = uninterrupted
    one = make_module(corpus / "manifest.jsonl", groups=1)
    assert_same(next(one.train_batches(states[4])), batches[4])
    four = make_module(corpus / "manifest.jsonl", groups=4)
    with pytest.raises(ValueError, match="2 groups.*data-parallel size of 1, 2"):
        four.train_batches(states[4])


def test_changed_data_is_noticed_on_resume(corpus, make_module, uninterrupted, caplog, tmp_path):
    rows = read_rows(corpus / "manifest.jsonl")[:-1]
    for row in rows:
        row["audio_filepath"] = str(corpus / row["audio_filepath"])
    module = make_module(write_manifest(tmp_path / "less.jsonl", rows), groups=2)
    with caplog.at_level("WARNING"):
        module.train_batches(uninterrupted[1][2])
    assert "changed since this state was saved" in caplog.text


def test_no_shape_is_beyond_the_plan(corpus, make_module):
    module = make_module(
        corpus / "manifest.jsonl",
        batch_tokens=220,
        use_multimodal_sampling=True,
        use_bucketing=True,
        num_buckets=3,
        groups=2,
    )
    planned = {b.name: b.shape for b in module.plan().buckets}
    met = {}
    for batch in islice(module.train_batches(), 12):
        met.setdefault(batch.bucket, set()).add(shape_of(batch))
    assert set(met) <= set(planned) and len(planned) == 3
    for name, shapes in met.items():
        s = planned[name]
        assert shapes == {(2, s.sequences, s.tokens, 2, s.clips, s.samples)}


@pytest.fixture
def damaged(tmp_path):
    """Eight recordings, of which six cannot be used, for six reasons."""
    rows, wave = [], np.full(8000, 0.1, np.float32)
    for n in range(8):
        soundfile.write(tmp_path / f"c{n}.wav", wave, 16000, subtype="FLOAT")
        row = {"audio_filepath": f"c{n}.wav", "duration": DURATION_S, "text": f"{n}"}
        rows.append({**row, "sampling_rate": 16000})  # so that no header is asked
    (tmp_path / "c1.wav").unlink()
    (tmp_path / "c2.wav").write_bytes(b"noise" * 99)
    soundfile.write(tmp_path / "c3.wav", wave[:0], 16000)
    soundfile.write(
        tmp_path / "c4.wav", np.where(np.arange(8000) == 9, np.nan, wave), 16000, "FLOAT"
    )
    (tmp_path / "c5.wav").write_bytes((tmp_path / "c0.wav").read_bytes()[:9000])
    soundfile.write(tmp_path / "c6.wav", np.tile(wave, 3), 16000)
    return write_manifest(tmp_path / "manifest.jsonl", rows)


CAUSES = {
    "missing": 1,
    "unreadable": 1,
    "empty": 1,
    "not_finite": 1,
    "truncated": 1,
    "longer_than_declared": 1,
}


def test_bad_audio_is_replaced_or_masked_in_the_same_shapes_and_is_counted(
    damaged, make_module, caplog
):
    module = make_module(damaged, batch_size=4, shuffle=False)
    stream = module.train_batches()
    with caplog.at_level("WARNING"):
        batches = list(islice(stream, 2))
    # the one good recording of the other batch is all that can take a place
    assert [b.ids for b in batches] == [("c0", "c7"), ("c0", "c7")]
    assert len({shape_of(b) for b in batches}) == 1
    for batch, rows in zip(batches, ((0, 1), (0, 3)), strict=True):
        used = batch.arrays.segments.any(axis=-1)[0]
        assert used.tolist() == [n in rows for n in range(4)]
        assert not batch.arrays.loss_mask[0, ~used].any()
        assert (batch.arrays.audio_lengths > 0).sum() == 2
    assert module.dropped == CAUSES == stream.get_state()["dropped"]
    for cause in CAUSES:
        assert f": {cause} (" in caplog.text


def test_counts_go_on_after_a_resume_and_are_logged_a_few_times(damaged, make_module, caplog):
    module = make_module(damaged, batch_size=8)
    stream = module.train_batches()
    with caplog.at_level("WARNING"):
        list(islice(stream, 12))
    assert module.dropped == {cause: 12 for cause in CAUSES}
    assert caplog.text.count(": missing (") == 10
    resumed = make_module(damaged, batch_size=8)
    list(islice(resumed.train_batches(stream.get_state()), 1))
    assert resumed.dropped == {cause: 13 for cause in CAUSES}


def test_edited_texts_behind_the_same_ids_are_told_on_resume(corpus, make_module, tmp_path, caplog):
    rows = [
        {**row, "audio_filepath": str(corpus / row["audio_filepath"])}
        for row in read_rows(corpus / "manifest.jsonl")
    ]
    state = make_module(write_manifest(tmp_path / "m.jsonl", rows)).train_batches().get_state()
    older = {key: value for key, value in state.items() if key != "contents"}
    same = make_module(write_manifest(tmp_path / "m.jsonl", rows))
    same.train_batches(state)
    assert "changed" not in caplog.text
    rows[3] = {**rows[3], "text": rows[3]["text"] + "?"}
    edited = make_module(write_manifest(tmp_path / "m.jsonl", rows))
    edited.train_batches(older)  # of a version that kept no such number
    assert "changed" not in caplog.text
    edited.train_batches(state)
    assert "the ids are the same, texts or durations differ" in caplog.text


def test_bad_audio_does_not_change_its_neighbours(damaged, make_module, tmp_path):
    good = [r for r in read_rows(damaged) if r["text"] in "07"]
    alone = make_module(write_manifest(tmp_path / "good.jsonl", good), batch_size=8, shuffle=False)
    with_bad = make_module(damaged, batch_size=8, shuffle=False)
    one, other = next(alone.train_batches()).arrays, next(with_bad.train_batches()).arrays
    used = other.segments.any(axis=-1)
    np.testing.assert_array_equal(other.tokens[used], one.tokens[0, :2])
    np.testing.assert_array_equal(other.audio_index[used], one.audio_index[0, :2])
    np.testing.assert_array_equal(other.audio[0, :2], one.audio[0, :2])


def test_a_disk_that_is_gone_stops_the_stream(make_module, tmp_path):
    rows = [{"audio_filepath": f"{n}.wav", "duration": 1.0, "text": "x"} for n in range(4)]
    stream = make_module(write_manifest(tmp_path / "m.jsonl", rows)).train_batches()
    with pytest.raises(SettingsError, match="20 consecutive batches without a usable recording"):
        list(stream)


def test_settings_that_leave_conversations_out_are_counted_by_cause(corpus, make_module):
    rows = read_rows(corpus / "manifest.jsonl")
    module = make_module(corpus / "manifest.jsonl", max_duration=1.0, min_duration=0.3)
    assert module.dropped == {
        "max_duration": sum(r["duration"] > 1.0 for r in rows),
        "min_duration": sum(r["duration"] < 0.3 for r in rows),
    }


def test_nothing_left_is_an_error_with_the_reasons(corpus, make_module):
    with pytest.raises(SettingsError, match=r"is left; left out: \{'max_tokens': 30\}"):
        make_module(corpus / "manifest.jsonl", max_tokens=3)
    with pytest.raises(SettingsError, match="no batch can be made of 30"):
        make_module(corpus / "manifest.jsonl", batch_size=31, drop_last=True)


def test_validation_goes_once_through_each_named_set_and_again(corpus, make_module):
    module = make_module(corpus / "manifest.jsonl", groups=3, validation=("clean", "noisy"))
    sets = module.validation_batches()
    assert list(sets) == ["clean", "noisy"]
    first, again = list(sets["clean"]), list(sets["clean"])
    for one, other in zip(first, again, strict=True):
        assert_same(one, other)
    assert [i for b in first for i in b.ids] == [f"clip{n:02d}" for n in range(30)]
    rows = first[-1].arrays.segments.any(axis=-1)
    assert rows.sum(axis=1).tolist() == [2, 2, 2]  # the last six, shared evenly


def test_processes_read_their_own_groups_of_a_validation(corpus, make_module):
    module = make_module(corpus / "manifest.jsonl", groups=3, validation=("clean",))
    whole = list(module.validation_batches()["clean"])
    parts = []
    for own in ((0,), (1, 2)):
        module.setup(frame_count=frames, groups=3, own_groups=own)
        parts.append(list(module.validation_batches(own_only=True)["clean"]))
        assert len(list(module.validation_batches()["clean"])[0].ids) == len(whole[0].ids)
        assert all(batch.share == len(own) / 3 for batch in parts[-1])
    for batch, one, two in zip(whole, *parts, strict=True):
        assert sorted(one.ids + two.ids) == sorted(batch.ids)
        texts = [[r.text for r in b.references] for b in (batch, one, two)]
        assert sorted(texts[1] + texts[2]) == sorted(texts[0])
        audio = [b.arrays.audio for b in (batch, one, two)]
        np.testing.assert_array_equal(audio[0][:1], audio[1][:1])
        np.testing.assert_array_equal(audio[0][1:], audio[2][1:])
        assert not audio[1][1:].any() and not audio[2][:1].any()


def test_validation_carries_the_references(corpus, make_module, tokenizer):
    module = make_module(corpus / "manifest.jsonl", validation=("clean",))
    texts = [row["text"] for row in read_rows(corpus / "manifest.jsonl")]
    references = [r for b in module.validation_batches()["clean"] for r in b.references]
    assert [r.text for r in references] == texts
    prompt = references[0].prompt
    shown = tokenizer.ids_to_text(prompt.tokens, remove_special_tokens=False)
    assert shown == f"<|im_start|>user\n{TAG}<|im_end|>\n<|im_start|>assistant\n"
    assert len(prompt.audio) == 1 and not prompt.loss_mask.any()


def test_validation_drops_count_once_however_often_it_runs(damaged, make_module):
    module = make_module(damaged, validation=("clean",))
    for _ in range(3):
        list(module.validation_batches()["clean"])
    assert module.dropped == CAUSES


def test_text_alone_and_several_clips_make_batches(tmp_path, make_module):
    soundfile.write(tmp_path / "a.wav", np.full(8000, 0.1), 16000)
    audio = {"from": "User", "type": "audio", "value": "a.wav", "duration": 0.5}
    response = {"from": "Assistant", "type": "text", "value": "yes"}
    text = {"from": "User", "type": "text", "value": "well?"}
    both = [audio, text, audio, response]
    turns = {"text": [text, response], "two": both, "more": [*both, audio, response]}
    lines = [{"id": name, "conversations": t} for name, t in turns.items()]
    only_text = make_module(write_manifest(tmp_path / "t.jsonl", lines[:1]))
    batch = next(only_text.train_batches())
    assert batch.arrays.audio.shape[1] == 1 and not batch.arrays.audio_lengths.any()
    mixed = make_module(write_manifest(tmp_path / "m.jsonl", lines), shuffle=False)
    arrays = next(mixed.train_batches()).arrays
    assert (arrays.audio_lengths > 0).sum() == 5
    clips = [
        set((row[row >= 0] // frames(arrays.audio.shape[-1])).tolist())
        for row in arrays.audio_index[0, :3]
    ]
    assert clips == [set(), {0, 1}, {2, 3, 4}]
    labels = arrays.targets[0][arrays.loss_mask[0]]
    assert len(labels) and (labels > 0).all()


NEMO_BLOCK = {
    "sample_rate": 16000,
    "prompt_format": "qwen",
    "token_equivalent_duration": 0.08,
    "seed": 42,
    "shuffle": True,
    "shard_seed": "randomized",
    "num_workers": 1,
    "batch_size": None,
    "use_bucketing": True,
    "use_multimodal_sampling": True,
    "measure_total_length": True,
    "batch_tokens": 4000,
    "max_tokens": 2048,
    "bucket_duration_bins": [64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048],
    "num_buckets": 10,
    "bucket_buffer_size": 5000,
}


def entry(corpus):
    manifest = str(corpus / "manifest.jsonl")
    return {"type": "lhotse_as_conversation", "cuts_path": manifest, "audio_locator_tag": TAG}


def test_the_blocks_of_nemos_own_yaml_are_accepted_and_what_is_ignored_is_told(corpus, tokenizer):
    tagged = {**entry(corpus), "tags": {"context": "Repeat after me."}}
    common = {
        k: NEMO_BLOCK[k] for k in ("prompt_format", "token_equivalent_duration", "shard_seed")
    }
    cfg = {
        "train_ds": {**NEMO_BLOCK, "input_cfg": [tagged]},
        "validation_ds": {
            **common,
            "datasets": {"val_set_0": {"input_cfg": [tagged]}},
            "sample_rate": 16000,
            "batch_size": 1,
            "seed": 42,
        },
    }
    with ignored_report() as ignored:
        module = DataModule(cfg, tokenizer)
    assert "data.train_ds.bucket_buffer_size" in ignored
    module.setup(frame_count=frames)
    assert [b.shape.sequences for b in module.plan().buckets] == [
        4000 // b.longest for b in module.plan().buckets
    ]
    assert len(list(module.validation_batches()["val_set_0"])) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_sise": 4}, "data.train_ds.batch_sise: unknown key; did you mean 'batch_size'"),
        ({"batch_size": "many"}, "data.train_ds.batch_size: expected"),
        (
            {"batch_duration": 100},
            "data.train_ds.batch_duration: conversations are measured in tok",
        ),
        ({"input_cfg": None}, "give exactly one of input_cfg"),
        ({"input_cfg": []}, "data.train_ds.input_cfg: the list is empty"),
        ({"input_cfg": None, "cuts_path": "/nowhere.jsonl"}, "/nowhere.jsonl: no such file"),
        ({"input_cfg": None, "cuts_path": "???"}, r"fill in data.train_ds.cuts_path"),
        ({"prompt_format": None}, "data.train_ds.prompt_format: required"),
        ({"prompt_format": "qwem"}, "unknown prompt format 'qwem'"),
        ({"prompt_format": "llama3"}, "needs the token"),
        ({"token_equivalent_duration": None}, "set token_equivalent_duration"),
        ({"seed": "dice"}, "data.train_ds.seed: expected an integer"),
    ],
)
def test_a_bad_setting_is_one_line_with_its_place(change, message, corpus, tokenizer):
    values = {**NEMO_BLOCK, "batch_size": 4, "input_cfg": [entry(corpus)], **change}
    with pytest.raises(SettingsError, match=message) as caught:
        DataModule({"train_ds": values}, tokenizer).setup(frame_count=frames)
    assert "\n" not in str(caught.value)


def test_a_tag_that_the_tokenizer_lacks_is_named(corpus, tokenizer):
    values = {**NEMO_BLOCK, "input_cfg": [{**entry(corpus), "audio_locator_tag": "<|sound|>"}]}
    with pytest.raises(SettingsError, match=r"audio_locator_tag needs the token '<\|sound\|>'"):
        DataModule({"train_ds": values}, tokenizer).setup(frame_count=frames)


def test_importing_the_room_loads_neither_lhotse_nor_grain_nor_torch():
    code = (
        "import sys; import speechlm2_jax.data as d; d.Tokenizer; d.PromptFormatter; "
        "import speechlm2_jax.data.audio; d.DataModule; d.DuplexS2SDataset; "
        "print([m for m in ('lhotse', 'grain', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
