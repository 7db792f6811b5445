"""Laws of the duplex models in their default mode, and what they refuse."""

import json

import jax
import numpy as np
import pytest

from speechlm2_jax.generation.sampling import SamplingConfig
from speechlm2_jax.models import SALM, DuplexS2SModel, DuplexS2SSpeechDecoderModel
from speechlm2_jax.settings import SettingsError
from tests.parity.duplex_golden import DATA, batch_of, configured, examples, pretrained


@pytest.fixture(scope="module", params=["duplex_s2s", "duplex_s2s_speech_decoder"])
def model(request):
    return pretrained(request.param)


@pytest.fixture(scope="module")
def losses(model):
    compiled = jax.jit(
        lambda variables, batch: model.losses(variables, batch, key=None, train=False)
    )
    return lambda batch: compiled(model.variables, batch)


def test_neighbours_and_padding_change_no_loss(model, losses):
    conversations = examples("pair")
    together = losses(batch_of(model, conversations))
    larger = losses(batch_of(model, conversations, more=1.5))
    alone = [losses(batch_of(model, [c])) for c in conversations]
    in_groups = losses(batch_of(model, conversations, groups=2))
    for part in ("loss", "text_loss", "audio_loss"):
        total, *others = (
            float((x.loss if part == "loss" else x.metrics[part]).total)
            for x in (together, larger, in_groups)
        )
        np.testing.assert_allclose(others, total, rtol=1e-5)
        each = [float((x.loss if part == "loss" else x.metrics[part]).total) for x in alone]
        np.testing.assert_allclose(sum(each), total, rtol=1e-5)
    assert float(together.loss.count) == sum(float(x.loss.count) for x in alone)


def test_drawn_speech_depends_on_the_seed_and_on_the_row_alone(model):
    signal = examples()[0].source_audio[None, :8000].repeat(3, axis=0)
    lengths = np.full(3, 8000)
    sampling = dict(
        text_sampling=SamplingConfig(do_sample=True, top_k=20),
        audio_sampling=SamplingConfig(do_sample=True, temperature=0.8),
        decode_audio=False,
    )
    one = model.offline_inference(signal, lengths, **sampling, seed=1)
    again = model.offline_inference(signal[:2], lengths[:2], **sampling, seed=1)
    other = model.offline_inference(signal, lengths, **sampling, seed=2)
    np.testing.assert_array_equal(one["tokens_audio"][:2], again["tokens_audio"])
    assert (one["tokens_audio"] != other["tokens_audio"]).any()
    assert (one["tokens_audio"][0] != one["tokens_audio"][1]).any()


def test_audio_shorter_than_a_frame_is_an_empty_answer(model):
    result = model.offline_inference(np.zeros((2, 400), np.float32), np.array([400, 0]))
    assert result["tokens_len"].tolist()[1] == 0
    assert result["text"][1] == ""
    assert result["audio_len"].tolist()[1] == 0
    assert np.isfinite(result["audio"]).all()


def test_what_is_no_batch_is_refused(model):
    with pytest.raises(ValueError, match=r"input_signal must be \[B, S\]"):
        model.offline_inference(np.zeros(100), np.array([100]))
    with pytest.raises(ValueError, match="between 0 and 100"):
        model.offline_inference(np.zeros((1, 100)), np.array([101]))


def test_rates_that_do_not_fit_are_refused_with_both_numbers(monkeypatch, tmp_path):
    cfg = json.loads((DATA / "duplex_s2s" / "cfg_input.json").read_text())
    codec = json.loads(json.dumps(pretrained("duplex_s2s")._blueprint.codec_cfg))
    codec["sample_rate"] = 16000
    (tmp_path / "config.json").write_text(json.dumps(codec))
    with pytest.raises(SettingsError, match=r"80\.0 ms .* 110\.2 ms"):
        DuplexS2SModel({**cfg, "pretrained_audio_codec": str(tmp_path)}, near=(DATA,))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    llm = DATA / "assets" / "llm"
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((llm / name).read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SettingsError, match="no eos token"):
        configured("duplex_s2s", tokenizer_path=str(tmp_path))


def test_the_other_kinds_keys_are_refused():
    with pytest.raises(SettingsError, match="DuplexS2SSpeechDecoderModel"):
        configured("duplex_s2s", speech_decoder={"n_layers": 1})
    cfg = json.loads((DATA / "duplex_s2s" / "cfg_input.json").read_text())
    with pytest.raises(SettingsError, match=r"model\.speech_decoder: required"):
        DuplexS2SSpeechDecoderModel(cfg, near=(DATA,))
    with pytest.raises(SettingsError, match="pretrained_audio_codec"):
        SALM({**cfg, "prompt_format": "llama2"}, near=(DATA,))


def test_pretrained_parts_start_a_model():
    model = configured("duplex_s2s")
    codec = {p: v for p, v in pretrained("duplex_s2s").variables.items() if p.startswith("codec.")}
    for path, value in codec.items():
        np.testing.assert_array_equal(model.variables[path], value)
    model.check_weights()


def test_a_whole_model_starts_another(tmp_path):
    saved = pretrained("duplex_s2s")
    model = configured("duplex_s2s", init_from_checkpoint=str(DATA / "duplex_s2s" / "hf"))
    for path, value in saved.variables.items():
        np.testing.assert_array_equal(model.variables[path], value, err_msg=path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SettingsError, match="is a run; write its weights"):
        configured("duplex_s2s", init_from_checkpoint=str(tmp_path))
