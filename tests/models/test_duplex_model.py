"""Invariants of the duplex models in their default mode, and what they refuse."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.conversion.writers import write_nemo
from speechlm2_jax.experiment import make_data
from speechlm2_jax.generation.sampling import SamplingConfig
from speechlm2_jax.models import SALM, DuplexS2SModel, DuplexS2SSpeechDecoderModel
from speechlm2_jax.models.codec import AudioCodec
from speechlm2_jax.settings import SettingsError
from tests.conversion.goldens import tensors
from tests.parity.duplex_golden import DATA, batch_of, configured, examples, pretrained

FP32_RTOL = 1e-5


SLOW = pytest.param("duplex_s2s", marks=pytest.mark.slow)
"""The other kind is this and a decoder."""


@pytest.fixture(scope="module", params=[SLOW, "duplex_s2s_speech_decoder"])
def model(request):
    return pretrained(request.param)


def with_dropout(run):
    """The recorded model with dropout in its adapter and its speech decoder."""
    cfg = pretrained(run).cfg
    adapter = {**cfg["perception"]["modality_adapter"], "dropout": 0.2}
    changes = {"perception": {**cfg["perception"], "modality_adapter": adapter}}
    if "speech_decoder" in cfg:
        changes["speech_decoder"] = {**cfg["speech_decoder"], "p_dropout": 0.2}
    return pretrained(run, **changes)


def sums_of(model, *, gradients):
    """Sums of losses, and their gradients, of a batch whose rows have places in a global batch."""
    names = [path for path, on in model.trainable.items() if np.any(on)]
    key = jax.random.key(3)

    def objective(trained, variables, batch):
        losses = model.losses(variables | trained, batch, key=key, train=True)
        return losses.loss.total, losses

    step = jax.jit(
        jax.value_and_grad(objective, has_aux=True)
        if gradients
        else lambda *given: (objective(*given), {})
    )

    def of(batch, places):
        batch = replace(batch, sequence_ids=np.asarray(places, np.int32))
        trained = {path: model.variables[path] for path in names}
        (_, losses), found = jax.device_get(step(trained, model.variables, batch))
        sums = {"loss": losses.loss, **losses.metrics}
        return {name: (float(x.total), float(x.count)) for name, x in sums.items()}, found

    return of


def only(batch, group):
    """The batch without the rows of other groups."""

    def kept(x):
        own = np.arange(len(x)) == group
        return np.where(own.reshape(-1, *[1] * (x.ndim - 1)), x, 0).astype(x.dtype)

    return jax.tree.map(kept, batch)


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", [SLOW, "duplex_s2s_speech_decoder"])
def test_neighbours_padding_and_groups_change_neither_loss_nor_gradient(run, gradients):
    """Random layers are on: what they draw belongs to the row's place in the global batch."""
    model = with_dropout(run)
    conversations, of = examples("pair"), sums_of(model, gradients=gradients)
    sums, together = of(batch_of(model, conversations), [[0, 1]])
    larger = batch_of(model, conversations, groups=2, more=1.5)
    places = [[0, 8], [1, 9]]
    regrouped, apart = of(larger, places)
    alone = [of(only(larger, group), places) for group in range(2)]
    for name, (total, count) in sums.items():
        np.testing.assert_allclose(regrouped[name], (total, count), rtol=FP32_RTOL)
        each = np.asarray([part[name] for part, _ in alone]).sum(0)
        np.testing.assert_allclose(each, (total, count), rtol=FP32_RTOL)
    frames = sums["loss"][1]  # the optimizer's gradient is that of the mean
    for path, expected in together.items():
        size = max(frames, np.abs(expected).max())
        for own in (apart[path], sum(gradients[path] for _, gradients in alone)):
            np.testing.assert_allclose(own / size, expected / size, atol=FP32_RTOL, err_msg=path)
    moved, _ = of(larger, [[2, 8], [3, 9]])
    assert abs(moved["loss"][0] - sums["loss"][0]) > 1e-3


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


@pytest.mark.slow  # compiles a step and a loop that sample
def test_a_session_draws_what_offline_inference_draws(model):
    wave = examples()[0].source_audio[:12_000]
    sampling = dict(
        text_sampling=SamplingConfig(do_sample=True, top_k=20),
        audio_sampling=SamplingConfig(do_sample=True, temperature=0.8),
        decode_audio=False,
        seed=1,
    )
    expected = model.offline_inference(wave[None], [len(wave)], **sampling)
    session = model.session(**sampling)
    for _ in range(2):
        frames = [*session.push(wave), *session.finish()]
        assert [f.text_token for f in frames] == expected["tokens_text"][0].tolist()
        codes = np.stack([f.codes for f in frames])
        np.testing.assert_array_equal(codes, expected["tokens_audio"][0])
        assert all(f.audio.size == 0 for f in frames)
        session.reset()


def test_audio_shorter_than_a_frame_has_an_empty_response(model):
    result = model.offline_inference(np.zeros((2, 400), np.float32), np.array([400, 0]))
    assert result["tokens_len"].tolist()[1] == 0
    assert result["text"][1] == ""
    assert result["audio_len"].tolist()[1] == 0
    assert np.isfinite(result["audio"]).all()


def test_what_is_no_batch_is_refused(model):
    with pytest.raises(ValueError, match=r"input_signal must be \[B, S\]"):
        model.offline_inference(np.zeros(100), np.array([100]))
    with pytest.raises(ValueError, match="from 0 to 100"):
        model.offline_inference(np.zeros((1, 100)), np.array([101]))
    with pytest.raises(ValueError, match="input_signal: audio is int16"):
        model.offline_inference(np.zeros((1, 100), np.int16), np.array([100]))
    with pytest.raises(ValueError, match="input_signal, row 1"):
        model.offline_inference(np.array([[0.0] * 100, [np.nan] * 100]), np.array([100, 100]))


def test_rates_that_do_not_fit_are_refused_with_both_numbers(monkeypatch, tmp_path):
    cfg = json.loads((DATA / "duplex_s2s" / "cfg_input.json").read_text())
    codec = json.loads(json.dumps(pretrained("duplex_s2s")._blueprint.codec_cfg))
    codec["sample_rate"] = 16000
    (tmp_path / "config.json").write_text(json.dumps(codec))
    with pytest.raises(SettingsError, match=r"80\.0 ms .* 110\.2 ms"):
        DuplexS2SModel({**cfg, "pretrained_audio_codec": str(tmp_path)}, near=(DATA,))


def test_data_that_do_not_fit_the_model_are_refused_with_both_numbers():
    model = configured("duplex_s2s")
    fitting = {"frame_length": 0.08, "source_sample_rate": 16000, "target_sample_rate": 22050}
    for key, given in (
        ("source_sample_rate", 8000),
        ("target_sample_rate", 24000),
        ("frame_length", 0.04),
    ):
        message = rf"data\.{key}={given} does not fit .* expects {fitting[key]}"
        with pytest.raises(SettingsError, match=message):
            make_data({**fitting, key: given, "train_ds": {}}, model)


def test_a_control_code_in_frame_0_is_the_codecs_silence():
    model = pretrained("duplex_s2s")
    codebooks = model._blueprint.network.codebooks
    generated = np.full((2, 3, codebooks.count), codebooks.bos)
    silent = model._silence(generated)
    assert silent.shape == (codebooks.count,) and (silent < codebooks.size).all() and silent.any()
    generated[:, 0] = 5  # the first generated codes are taken for silence
    assert not model._silence(generated).any()


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
    with pytest.raises(
        SettingsError, match=r"model\.speech_decoder\.num_layers: .* key is n_layers"
    ):
        t5 = {"num_layers": 2, "d_ff": 64, "num_heads": 4, "dropout_rate": 0.1}
        configured("duplex_s2s_speech_decoder", speech_decoder=t5)
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


def test_the_scoring_asr_is_found_before_training(tmp_path, monkeypatch):
    asr_path = "assets/asr_scoring.nemo"
    assert (DATA / asr_path).is_file()
    assert configured("duplex_s2s", scoring_asr=asr_path).find_scoring_asr() == DATA / asr_path
    assert configured("duplex_s2s", scoring_asr=None).find_scoring_asr() is None
    with pytest.raises(SettingsError, match=r"model\.scoring_asr: .*'gone\.nemo', or null"):
        configured("duplex_s2s", scoring_asr="gone.nemo").check_weights()
    asked = []
    (tmp_path / "model.nemo").touch()

    def fetch(name, **_):
        asked.append(name)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    bare = configured("duplex_s2s", scoring_asr="stt_en_fastconformer_transducer_large")
    assert bare.find_scoring_asr() == tmp_path / "model.nemo"
    assert asked == ["nvidia/stt_en_fastconformer_transducer_large"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("codec", {}, "AudioCodecModel is not a supported ASR model"),
        ("asr_scoring", {"decoding": {"strategy": "beam"}}, "strategy='beam' is not supported"),
        ("asr_scoring", {"target": "x.EncDecMultiTaskModel"}, "EncDecMultiTaskModel is no"),
        ("asr_scoring", {"tokenizer": {"type": "agg"}}, "no SentencePiece tokenizer"),
        ("asr_scoring", {"encoder": None}, "its config has no encoder"),
        ("asr_scoring", {"target": "x.EncDecCTCModelBPE"}, "decoder.decoder_layers"),
    ],
)
def test_an_unusable_scoring_asr_is_found_before_training(name, change, message, tmp_path):
    archive = read_nemo(DATA / "assets" / f"{name}.nemo")
    files = {n: archive.artifact(n) for n in archive.members if not n.startswith("model_")}
    path = tmp_path / "unusable.nemo"
    write_nemo(path, {**archive.config, **change}, tensors(archive.weights), files)
    with pytest.raises(SettingsError, match=message) as caught:
        configured("duplex_s2s", scoring_asr=str(path)).check_weights()
    assert str(caught.value).startswith("model.scoring_asr: ")
    assert "or null" in str(caught.value)


def test_a_scoring_asr_is_looked_at_without_its_weights(monkeypatch):
    monkeypatch.setattr("speechlm2_jax.conversion.mapping.load", None)
    configured("duplex_s2s", scoring_asr="assets/asr_scoring.nemo").check_weights()
    with pytest.raises(SettingsError, match=r"model\.scoring_asr: .*tokenizer\.json"):
        configured("duplex_s2s", scoring_asr="assets/llm/tokenizer.json").check_weights()


def test_a_whole_model_starts_another(tmp_path):
    saved = pretrained("duplex_s2s")
    model = configured("duplex_s2s", init_from_checkpoint=str(DATA / "duplex_s2s" / "hf"))
    for path, value in saved.variables.items():
        np.testing.assert_array_equal(model.variables[path], value, err_msg=path)
    (tmp_path / "checkpoints").mkdir()
    empty = configured("duplex_s2s", init_from_checkpoint=str(tmp_path))
    with pytest.raises(SettingsError, match="is a run without a checkpoint"):
        empty.check_weights()


def test_a_row_uses_every_position_of_the_speech_decoder_and_no_more():
    model = pretrained("duplex_s2s_speech_decoder")
    cfg, audio = model.cfg["speech_decoder"], examples()[0].source_audio
    frames = model.frame_count(len(audio))
    table = "speech_decoder.transformer.positions"
    limited = DuplexS2SSpeechDecoderModel(
        {
            **model.cfg,
            "pretrained_weights": False,
            "speech_decoder": {**cfg, "max_length_causal_mask": frames},
        },
        near=(DATA,),
        variables={**model.variables, table: model.variables[table][:frames]},
    )
    assert limited.max_frames == frames
    outputs = [
        m.offline_inference(audio[None], np.array([len(audio)]), decode_audio=False)
        for m in (model, limited)
    ]
    np.testing.assert_array_equal(outputs[0]["tokens_audio"], outputs[1]["tokens_audio"])
    longer = np.pad(audio, (0, 2 * 1280))
    with pytest.raises(
        ValueError, match=rf"recording 0 has \d+ frames .* has {frames} learnt positions"
    ):
        limited.offline_inference(longer[None], np.array([len(longer)]))


def test_a_decoder_that_looks_ahead_is_refused():
    cfg = json.loads((DATA / "duplex_s2s_speech_decoder" / "cfg_input.json").read_text())
    decoder = {**cfg["speech_decoder"], "is_causal": False}
    with pytest.raises(SettingsError, match=r"model\.speech_decoder\.is_causal: .* set it to true"):
        DuplexS2SSpeechDecoderModel({**cfg, "speech_decoder": decoder}, near=(DATA,))


def test_the_edges_of_nemos_batch_reach_the_agents_audio(tmp_path):
    """A codec that looks ahead mirrors the end of the longest row, with nemo_exact."""
    codec_cfg = json.loads(json.dumps(pretrained("duplex_s2s")._blueprint.codec_cfg))
    codec_cfg["audio_decoder"] |= {
        "_target_": "a.HiFiGANDecoder",
        "pad_mode": "reflect",
        "n_groups_equal_to_out_channels": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(codec_cfg))
    cfg = json.loads((DATA / "duplex_s2s" / "cfg_input.json").read_text())
    changes = {"pretrained_audio_codec": str(tmp_path), "pretrained_weights": False}
    model = DuplexS2SModel({**cfg, **changes, "nemo_exact": True}, near=(DATA,))
    prefix = "codec."
    codec = AudioCodec(codec_cfg)
    codec.variables = {
        path.removeprefix(prefix): value
        for path, value in model.variables.items()
        if path.startswith(prefix)
    }
    audio = np.random.default_rng(0).normal(scale=0.1, size=(2, 16000)).astype(np.float32)
    result = model.offline_inference(audio, np.array([16000, 9000]))
    codes, lengths = result["tokens_audio"], result["tokens_len"]
    exact = np.asarray(codec.decode(codes, lengths, nemo_exact=True).audio)
    end = result["audio_len"][1]
    np.testing.assert_allclose(result["audio"][1, :end], exact[1, :end], atol=1e-6)
    usual = np.asarray(codec.decode(codes, lengths).audio)
    assert np.abs(usual[1, :end] - exact[1, :end]).max() > 1e-4
