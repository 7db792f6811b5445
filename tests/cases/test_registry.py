"""Every kind of checkpoint opened by every class: it opens, or the error names the class."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import speechlm2_jax as slm
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.repacking import repack
from speechlm2_jax.evaluation.duplex.plan import find_model
from speechlm2_jax.pretrained import registry
from speechlm2_jax.settings import SettingsError

DATA = Path(__file__).resolve().parents[1] / "data"
OPENERS: Mapping[str, tuple[str, ...]] = {
    "salm/qwen3_lora_hf": ("SALM",),
    "salm/llama_adapter_hf": ("SALM",),
    "salm/qwen3_lora.ckpt": ("SALM",),
    "duplex/duplex_s2s/hf": ("DuplexS2SModel",),
    "duplex/duplex_s2s/step2_weights_only.ckpt": ("DuplexS2SModel",),
    "duplex/duplex_s2s_speech_decoder/hf": ("DuplexS2SSpeechDecoderModel",),
    "asr/ctc.nemo": ("ASRModel", "CTCModel"),
    "asr/rnnt.nemo": ("ASRModel",),
    "asr/tdt.nemo": ("ASRModel",),
    "codec/lfr22_tiny.nemo": ("AudioCodec",),
    "codec/nano12_tiny.nemo": ("AudioCodec",),
    "llm/llama": (),
    "llm/qwen3": (),
    "llm/llama/model.safetensors": (),
}


@pytest.mark.parametrize("name", OPENERS)
def test_a_checkpoint_is_told_by_what_lies_there(name):
    kind = registry.identify(DATA / name)
    assert kind is not None and kind.classes == OPENERS[name]


@pytest.mark.parametrize("asked", [name for name in slm.models.__all__ if name != "DraftLLM"])
@pytest.mark.parametrize("name", OPENERS)
def test_the_wrong_class_names_the_right_one(name, asked, monkeypatch):
    monkeypatch.chdir((DATA / name).parent if "hf" not in name else (DATA / name).parents[1])
    model = getattr(slm.models, asked)
    if asked in OPENERS[name]:
        registry.require(model, DATA / name)
        return
    with pytest.raises(SettingsError) as error:
        model.from_pretrained(DATA / name)
    text = str(error.value)
    assert "\n" not in text and str(DATA / name) in text
    for right in OPENERS[name]:
        assert f"slm.models.{right}.from_pretrained" in text
    if name in ("llm/llama", "llm/qwen3"):
        assert "model.pretrained_llm" in text and "Hugging Face LLM" in text


def test_a_user_class_opens_what_its_parent_opens():
    class Mine(slm.models.SALM):
        pass

    registry.require(Mine, DATA / "salm/qwen3_lora_hf")
    with pytest.raises(SettingsError, match="DuplexS2SModel"):
        registry.require(Mine, DATA / "duplex/duplex_s2s/hf")


@pytest.mark.parametrize("archive", ["asr/ctc.nemo", "codec/lfr22_tiny.nemo"])
def test_a_folder_with_one_archive_is_that_archive(archive, tmp_path):
    shutil.copy(DATA / archive, tmp_path)
    kind = registry.identify(tmp_path)
    assert kind is not None and kind.classes == OPENERS[archive]


def test_the_error_for_an_unpacked_archive_tells_how_to_pack_it(tmp_path):
    repack(DATA / "codec/lfr22_tiny.nemo", tmp_path / "codec")
    with pytest.raises(SettingsError, match=r"convert\.py .*AudioCodec"):
        slm.models.AudioCodec.from_pretrained(tmp_path / "codec")


def run_of(folder: Path, cfg: Mapping[str, object]) -> Path:
    (folder / "checkpoints/10/params").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(cfg))
    return folder


PARTS = {"pretrained_llm": "a", "perception": {}}
BLOCKS = [
    ({**PARTS, "prompt_format": "qwen"}, "SALM"),
    ({**PARTS, "pretrained_audio_codec": "c"}, "DuplexS2SModel"),
    ({**PARTS, "pretrained_audio_codec": "c", "speech_decoder": {}}, "DuplexS2SSpeechDecoderModel"),
    ({"_target_": "nemo.collections.asr.models.EncDecCTCModelBPE"}, "CTCModel"),
    ({"preprocessor": {}, "encoder": {}, "tokenizer": {}}, "CTCModel"),
]


@pytest.mark.parametrize(("block", "name"), BLOCKS)
def test_the_model_block_of_a_run_decides_its_kind(block, name, tmp_path):
    run = run_of(tmp_path / "run", block)
    kind = registry.identify(run)
    assert kind is not None and name in kind.classes
    assert registry.trained_class(block) == name
    other = slm.models.AudioCodec
    with pytest.raises(SettingsError, match=rf"slm\.models\.{name}"):
        registry.require(other, run)


@pytest.mark.parametrize(
    "target", ["AudioCodecModel", "EncDecRNNTBPEModel", "os.system", "Unheard"]
)
def test_a_class_that_is_not_trained_is_refused_with_those_that_are(target):
    with pytest.raises(SettingsError, match=f"{target}.*SALM.*EncDecCTCModelBPE"):
        registry.trained_class({"_target_": target, **PARTS})


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
            "Whisper",
        ),
        ({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}, "pretrained_llm"),
        ({"model_type": "llama"}, "pretrained_llm"),
    ],
)
def test_other_models_of_hugging_face_are_named(config, match, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=match):
        slm.models.SALM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"model_type": 5}'])
def test_a_config_without_a_kind_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert registry.identify(tmp_path) is None
    with pytest.raises((SettingsError, ConversionError), match=r"config\.json"):
        slm.models.SALM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "name", "match"),
    [
        ("pretrained_llm", "salm/qwen3_lora_hf", "a SALM.*init_from_checkpoint"),
        ("pretrained_asr", "codec/lfr22_tiny.nemo", "an audio codec.*ASRModel"),
    ],
)
def test_a_component_of_another_kind_is_named(key, name, match):
    cfg = json.loads((DATA / "salm/llama_adapter.json").read_text())["cfg_in"]
    parts = {"pretrained_llm": "llm/llama", "pretrained_asr": "salm/asr.nemo", key: name}
    with pytest.raises(SettingsError, match=f"model.{key}: .*{match}"):
        slm.models.SALM({**cfg, **{k: str(DATA / v) for k, v in parts.items()}})


@pytest.mark.parametrize("name", ["asr/ctc.nemo", "codec/lfr22_tiny.nemo", "llm/llama"])
def test_evaluation_names_what_it_cannot_evaluate(name):
    with pytest.raises(SettingsError, match="pretrained_name: .*") as error:
        find_model({"pretrained_name": str(DATA / name)})
    assert (OPENERS[name] or ("pretrained_llm",))[0] in str(error.value)


@pytest.mark.parametrize("name", ["salm/qwen3_lora_hf", "duplex/duplex_s2s/hf"])
def test_evaluation_takes_what_it_can(name):
    found = find_model({"pretrained_name": str(DATA / name)})
    assert found.is_duplex == name.startswith("duplex")
