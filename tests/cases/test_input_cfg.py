"""Entries of `input_cfg` as NeMo 3.0.0 reads them: files, groups, tags, lists of lists."""

import inspect
import json

import numpy as np
import pytest

from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import AudioTurn
from speechlm2_jax.data.input_config import KEY_TYPES, READ_TYPES, SOURCES, InputConfig
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.settings import SettingsError, build, ignored_report, key_problems, load

ROW = {"audio_filepath": "a.wav", "duration": 0.5, "text": "yes"}


def sources(input_cfg=None, **more):
    values = {"batch_size": 1, **({} if input_cfg is None else {"input_cfg": input_cfg}), **more}
    config = build(DataLoaderConfig, values, "data.train_ds")
    return read_sources(config, "data.train_ds", SALMDataset.read)


def refusal(*args, **more):
    with pytest.raises(SettingsError) as caught:
        sources(*args, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    def write(name="m.jsonl", **fields):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**ROW, **fields}) + "\n")
        return str(path)

    monkeypatch.chdir(tmp_path)
    return write


def entry(path, **more):
    return {"type": "lhotse_as_conversation", "manifest_filepath": path, **more}


def group(*entries, **more):
    return {"type": "group", "input_cfg": list(entries), **more}


def test_a_groups_tags_are_fields_and_never_turns(manifest):
    """NeMo's attach_tags runs on the finished conversations of a group."""
    outer = {"context": "outer", "system_prompt": "outer", "lang": "en", "task": "asr"}
    inner = {"context": "inner", "lang": "de"}
    (one,) = sources([group(group(entry(manifest())), tags=outer)])
    assert isinstance(one.conversations[0].turns[0], AudioTurn)
    assert {k: one.conversations[0].fields[k] for k in outer} == outer
    (one,) = sources([group(group(entry(manifest(), tags=inner), tags={"lang": "fr"}), tags=outer)])
    conversation = one.conversations[0]
    assert [t[0] for t in conversation.messages()] == ["user", "user", "assistant"]
    assert conversation.messages()[0] == ("user", "inner")
    assert conversation.fields["lang"] == "en"  # the outermost, which NeMo attaches last


def test_the_tags_of_an_entry_open_the_dialog_before_the_rows_own(manifest):
    tags = {"context": "tag", "system_prompt": "sys"}
    (one,) = sources([entry(manifest(context="own"), tags=tags)])
    assert one.conversations[0].messages()[:2] == [("system", "sys"), ("user", "tag")]


def test_a_file_of_entries_resolves_the_environment_and_its_own_keys(
    manifest, tmp_path, monkeypatch
):
    manifest("data/a.jsonl", text="a")
    monkeypatch.setenv("CORPUS", str(tmp_path / "data"))
    monkeypatch.delenv("NAME_OF_IT", raising=False)
    (tmp_path / "set.yaml").write_bytes(
        b"\xef\xbb\xbf"
        b"- type: lhotse_as_conversation\n"
        b"  manifest_filepath: ${oc.env:CORPUS}/${oc.env:NAME_OF_IT,a}.jsonl\n"
        b"  tags: {lang: en, also: '${.lang}'}\n"
    )
    (one,) = sources("set.yaml")
    assert one.conversations[0].response == "a"
    assert one.conversations[0].fields["also"] == "en"
    monkeypatch.delenv("CORPUS")
    assert "set.yaml: 0.manifest_filepath: environment variable CORPUS is not set" in refusal(
        "set.yaml"
    )


def test_a_groups_file_is_read_from_here_or_from_beside_the_file_that_names_it(manifest, tmp_path):
    path = manifest("sets/m.jsonl")
    line = f"- {json.dumps(entry(path, weight=3))}\n- {json.dumps(entry(path, weight=1))}\n"
    (tmp_path / "sets" / "part.yaml").write_text(line)
    (tmp_path / "sets" / "all.yaml").write_text(
        "- {type: group, input_cfg: part.yaml, weight: 1}\n"
    )
    for named in ("sets/all.yaml", [group() | {"input_cfg": "sets/part.yaml", "weight": 2}]):
        found = sources(named)
        np.testing.assert_allclose([one.share for one in found], [0.75, 0.25])
    # a temperature for each level, those of files too
    found = sources("sets/all.yaml", reweight_temperature=[1, 0])
    np.testing.assert_allclose([one.share for one in found], [0.5, 0.5])


def test_a_file_that_names_itself_is_refused(manifest, tmp_path):
    (tmp_path / "loop.yaml").write_text("- {type: group, input_cfg: loop.yaml}\n")
    assert "input_cfg names itself" in refusal("loop.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "empty.yaml: expected a list of entries" in refusal(
        [group() | {"input_cfg": "empty.yaml"}]
    )


def test_lists_of_lists_name_manifests_with_or_without_weights(manifest):
    a, b = manifest("a.jsonl", text="a"), manifest("b.jsonl", text="b")
    for listed in ([a, b], [[a], [b]], [[a, b]]):
        for found in (sources(None, manifest_filepath=listed), sources([entry(listed)])):
            assert [c.response for one in found for c in one.conversations] == ["a", "b"]
            assert [one.share for one in found] == [None]
    found = sources([entry([[a, 3], [b, 1.0]])])
    np.testing.assert_allclose([one.share for one in found], [0.75, 0.25])
    assert "a weight to every path or to none" in refusal([entry([[a, 3], [b]])])
    assert "weights must be positive" in refusal([entry([[a, 3], [b, -1]])])


def test_settings_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load(path) == {"a": 1}
    path.write_bytes("a: 1\n".encode("utf-16"))
    with pytest.raises(SettingsError, match=r"c.yaml: UTF-16 text \(by its byte order mark\)"):
        load(path)


NEMOS_KEYS = {
    "shuffle": True,
    "shard_seed": 3,
    "text_field": "words",
    "lang_field": "lang",
    "metadata_only": True,
    "force_finite": True,
    "max_open_streams": 4,
    "audio_locator_tag": "<a>",
    "token_equivalent_duration": 0.08,
    "skip_missing_manifest_entries": True,
    "force_map_dataset": True,
    "force_iterable_dataset": True,
    "slice_length": 10,
    "reweight_temperature": [1.0],
    "weight": 2.0,
    "tags": {"lang": "en"},
    "tarred_audio_filepaths": "audio_0.tar",
    "extra_fields": [{"type": "text_iter", "name": "q", "path": "q.txt"}],
    "language": "en",
    "source_language": "en",
    "target_language": "de",
    "target_paths": "b.txt",
    "questions_path": "q.txt",
    "questions_language": "en",
    "audio_placeholders": ["<x>"],
    "audio_root": "audio",
    "audio_field": "sound",
    "duration_field": "secs",
    "sampling_rate": 8000,
    "input_roles": ["caller"],
    "output_roles": ["clerk"],
    "strip_timestamp_tokens": False,
    "move_agent_text_back_by": 0.1,
    "filter_samples_starting_with_agent": True,
    "agent_roles": ["bot"],
    "user_roles": ["human"],
    "target_agent_name": "a",
    "target_user_name": "u",
    "agent_silence_duration": 1.0,
    "add_extra_end_silence": True,
    "extra_end_silence_range": [0.1, 0.2],
    "max_cer": 0.5,
    "min_context_speaker_similarity": 0.1,
    "target_speaker": "x",
    "sample_rate": 16000,
}
"""Each key that NeMo 3.0.0's parsers of entries read, but for those that tell where."""


@pytest.mark.parametrize("kind", READ_TYPES)
def test_every_key_of_nemos_entries_is_honoured_reported_or_refused(kind):
    where = {"group": {"input_cfg": [entry("m.jsonl")]}}.get(kind, {SOURCES[kind][0]: "x"})
    if kind in ("parquet", "share_gpt", "nemo_tarred", "nemo_tarred_to_duplex"):
        where = {"manifest_filepath": "x"}
    needs = {"txt_pair": {"target_paths": "y"}}.get(kind, {})
    needs |= {"tarred_audio_filepaths": "z"} if "nemo_tarred" in kind else {}
    for key, value in NEMOS_KEYS.items():
        with ignored_report() as report:
            try:
                build(InputConfig, {"type": kind, **where, **needs, key: value}, "entry")
            except SettingsError as error:
                assert f"entry.{key}: " in str(error) or "tarred_audio_filepaths" in str(error)
                continue
        honoured = kind in (*KEY_TYPES.get(key, ()), "group") and key not in InputConfig.IGNORED
        assert (f"entry.{key}" in report) != (honoured or key == "weight"), key


def test_each_key_of_one_type_is_read_by_code():
    """A key that no reader looks at would be honoured in name alone."""
    from speechlm2_jax.data import entry_readers, parquet, salm_dataset, sources, text_readers
    from speechlm2_jax.data.duplex import conversions, forms
    from speechlm2_jax.data.duplex import entry_readers as duplex_readers

    modules = (entry_readers, salm_dataset, sources, text_readers, duplex_readers, conversions)
    modules = (*modules, parquet, forms)
    code = "\n".join(map(inspect.getsource, modules))
    assert [key for key in KEY_TYPES if key not in code] == []


def test_a_type_that_is_refused_is_told_before_its_keys():
    values = {"type": "multi_speaker_simulator", "simulator_type": "x", "min_delay": 1}
    with pytest.raises(SettingsError, match="entry.type: 'multi_speaker_simulator': mixtures"):
        build(InputConfig, values, "entry")
    (problem,) = key_problems(DataLoaderConfig, {"input_cfg": [values]}, "data")
    assert problem.startswith("data.input_cfg.0.type: 'multi_speaker_simulator'")


def test_tags_that_make_no_turns_are_reported(tmp_path):
    tags = {"context": "c", "system_prompt": "s", "lang": "en"}
    with ignored_report() as report:
        build(InputConfig, {"type": "txt", "paths": "x", "tags": tags}, "entry")
        build(InputConfig, {**entry("x"), "tags": tags}, "other")
    assert sorted(report) == ["entry.tags.context", "entry.tags.system_prompt"]
