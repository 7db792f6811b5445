"""Entries of `input_cfg` as NeMo 3.0.0 reads them: files, groups, tags, lists of lists."""

import json

import numpy as np
import pytest

from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import AudioTurn
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.settings import SettingsError, build, load

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
