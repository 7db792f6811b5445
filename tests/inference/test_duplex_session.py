"""A session gives frame by frame what NeMo's offline inference gives for the whole recording."""

from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.codec.config import HiFiGANDecoderConfig
from speechlm2_jax.data.audio import resample
from speechlm2_jax.generation.duplex import DuplexSamplingConfig
from speechlm2_jax.inference.sessions import duplex_step, opening
from speechlm2_jax.inference.sessions.duplex_step import SessionFrames
from speechlm2_jax.inference.sessions.opening import SessionOptions
from speechlm2_jax.layers.rope import DynamicScaling, RopeConfig
from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.networks.channels import without_control
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from tests.parity.duplex_golden import facts, golden, pretrained, recorded_batch
from tests.parity.sampled import sampled

ATOL = 1e-4
WINDOW_S = 4.0
"""50 frames, which a recording does not fill."""
FEW = 8000
"""Samples that are pushed one by one."""
RUNS = [
    "duplex_s2s_speech_decoder_cfg",
    pytest.param("duplex_s2s", marks=pytest.mark.slow),  # another compilation of the step
]


@cache
def model(run=RUNS[0]):
    return pretrained(run)


@cache
def opened(run):
    return model(run).session(session_window_s=WINDOW_S)


def fresh(run=RUNS[0]):
    """The session of a model, at its start: all tests share a compiled step."""
    session = opened(run)
    session.reset()
    return session


@pytest.fixture(params=RUNS)
def run(request):
    return request.param


def recording(row=0):
    batch = recorded_batch()
    return batch["source_audio"][row, : batch["source_audio_lens"][row]]


def pushed(session, wave, size):
    return [f for n in range(0, len(wave), size) for f in session.push(wave[n : n + size])]


def tokens(frames):
    return [frame.text_token for frame in frames]


def codes(frames):
    return np.stack([frame.codes for frame in frames])


@pytest.mark.parametrize("size", [333, 1280, 5000])
def test_any_pushes_give_the_tokens_audio_and_text_of_nemo(run, size):
    session, g = fresh(run), golden(run)
    frames = [*pushed(session, recording(), size), *session.finish()]
    assert tokens(frames) == g["infer_pair/tokens_text"][0].tolist()
    np.testing.assert_array_equal(codes(frames), g["infer_pair/tokens_audio"][0])
    audio = np.concatenate([frame.audio for frame in frames])
    sample = sampled(audio)  # of the first of the two rows
    expected = g["infer_pair/audio:sample"][: len(sample.values)]
    np.testing.assert_allclose(sample.values, expected, atol=ATOL)
    np.testing.assert_allclose(sample.rms, g["infer_pair/audio:rms"][:1], atol=ATOL)
    assert len(audio) == g["infer_pair/audio_len"][0]
    assert "".join(frame.text for frame in frames) == facts(run)["infer_pair"]["text"][0]


def test_samples_may_come_one_by_one(run):
    frames = pushed(fresh(run), recording()[:FEW], 1)
    g = golden(run)
    assert len(frames) == 2 * (FEW // 2560)
    assert tokens(frames) == g["infer_pair/tokens_text"][0, : len(frames)].tolist()
    np.testing.assert_array_equal(codes(frames), g["infer_pair/tokens_audio"][0, : len(frames)])


def test_another_length_ends_with_the_same_frames(run):
    session, g = fresh(run), golden(run)
    frames = [*session.push(recording(1)), *session.finish()]
    assert tokens(frames) == g["infer_pair/single1/tokens_text"][0].tolist()
    np.testing.assert_array_equal(codes(frames), g["infer_pair/single1/tokens_audio"][0])
    with pytest.raises(ValueError, match=r"ended; call reset\(\)"):
        session.push(recording())


def test_frames_tell_their_time_and_the_state_stays_as_large():
    session = fresh()
    assert (session.chunk_s, session.latency_s) == (0.16, 0.08)  # [70, 1]: two frames
    size = session.state_bytes
    frames = pushed(session, recording()[:5000], 5000)
    programs = session._step._cache_size()
    frames += pushed(session, recording()[5000:], 5000)
    assert [frame.index for frame in frames] == list(range(len(frames)))
    for frame in frames:
        assert frame.start_s == pytest.approx(0.08 * frame.index)
        assert 0 <= frame.known_s - frame.end_s <= session.latency_s + 1e-9
        assert frame.compute_s > 0
    assert session.state_bytes == size > 0
    assert session._step._cache_size() == programs


def test_an_iteration_that_stops_early_loses_nothing():
    session, wave = fresh(), recording()
    first = next(session.push(wave))
    frames = [first, *session.push(wave[:0]), *session.finish()]
    assert tokens(frames) == golden(RUNS[0])["infer_pair/tokens_text"][0].tolist()


def test_samples_of_another_rate_are_resampled_as_they_come():
    wave = resample(recording(), 16000, 48000)
    other = model().session(session_window_s=WINDOW_S, sampling_rate=48000)
    assert 0 < other.latency_s - fresh().latency_s < 0.002
    frames = [*pushed(other, wave, 333), *other.finish()]
    session = fresh()
    expected = [*session.push(resample(wave, 48000, 16000)), *session.finish()]
    assert tokens(frames) == tokens(expected)
    np.testing.assert_array_equal(codes(frames), codes(expected))


def test_an_interrupted_turn_ends_with_the_next_frame():
    session, wave = fresh(), recording()
    eos, g = model().speech_eos_id, golden(RUNS[0])["infer_pair/tokens_audio"][0]
    frames = pushed(session, wave[:12800], 1280)
    session.interrupt()  # without a turn it changes nothing
    frames += pushed(session, wave[12800:25600], 1280)
    np.testing.assert_array_equal(codes(frames), g[: len(frames)])
    session._conversation.is_in_turn = True  # this model never begins a turn
    session.interrupt()
    after = pushed(session, wave[25600:], 1280)
    assert (after[0].codes == eos).all()
    assert (after[1].codes != eos).any()
    assert (codes(after[1:]) != g[len(frames) + 1 : len(frames) + len(after)]).any()
    session.reset()
    np.testing.assert_array_equal(codes([*session.push(wave), *session.finish()]), g)


def test_a_turn_lasts_from_its_begin_token_to_its_end_token():
    session, ids = fresh(), model().turn_ids
    marks = []
    for token in (ids.pad, ids.bos, ids.pad, 9, ids.eos, ids.pad):
        frames = SessionFrames(
            text=jnp.full((1, 1), token),
            codes=jnp.zeros((1, 1, 3), jnp.int32),
            audio=jnp.zeros((1, 1, 4)),
            is_real=jnp.ones((1, 1), bool),
        )
        marks += [frame.is_in_turn for frame in session._conversation.frames(frames, 0, 0.0)]
    assert marks == [False, True, True, True, False, False]


@pytest.mark.parametrize("nemo_exact", [False, True])
def test_control_codes_decode_as_offline(nemo_exact):
    """The codes that replace them, frame by frame, are those of `without_control`."""
    network = replace(model()._blueprint.network, nemo_exact=nemo_exact)
    codebooks, silence = network.codebooks, jnp.array([7, 8, 9])
    state = fresh()._state
    state = replace(state, replacement=silence[None])
    for first in ([1, 2, 3], [4, codebooks.eos, codebooks.bos]):
        codes = jnp.array([[first, [codebooks.eos] * 3, [5, 6, 7]]])
        kept, decoded = state, []
        for t in range(3):
            before = kept.dialog._replace(frame=jnp.full(1, t))
            kept = replace(kept, dialog=before)
            dialog = before._replace(codes=codes[:, t])
            replacement = duplex_step._replacement(network, kept, dialog)
            kept = replace(kept, replacement=replacement)
            decoded.append(jnp.where(codes[:, t] >= codebooks.size, replacement, codes[:, t]))
        expected = without_control(codes, silence, codebooks, nemo_exact=nemo_exact)
        np.testing.assert_array_equal(jnp.stack(decoded, axis=1), expected)


def test_what_is_no_stream_of_samples_is_refused():
    session = fresh()
    with pytest.raises(ValueError, match=r"samples must be floats \[S\] .* got int16 \[3\]"):
        session.push(np.zeros(3, np.int16))
    with pytest.raises(ValueError, match=r"got float64 \[1, 3\]"):
        session.push(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="samples: NaN"):
        session.push(np.array([0.0, np.nan]))


def refusal(network, **changes):
    options = SessionOptions(
        tokenizer=model().tokenizer,
        input_hz=16000,
        decode_audio=True,
        window_s=1.0,
        sampling=DuplexSamplingConfig(),
        seed=0,
    )
    with pytest.raises(ValueError, match="this model has no sessions") as error:
        opening._plan(replace(network, **changes), options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_stream_is_refused_with_its_setting():
    network = model()._blueprint.network
    perception = network.perception
    mel = replace(perception.preprocessor, normalize="per_feature")
    message = refusal(network, perception=replace(perception, preprocessor=mel))
    assert "model.perception.preprocessor.normalize=per_feature" in message
    assert "trained with NA" in message
    for block in ("encoder", "modality_adapter"):
        config: FastConformerConfig = getattr(perception, block)
        whole = replace(config, att_context_size=(-1, -1), att_context_style="regular")
        message = refusal(network, perception=replace(perception, **{block: whole}))
        assert f"model.perception.{block}.att_context_size=[-1, -1]" in message
        assert "such as [70, 1]" in message
    decoder = HiFiGANDecoderConfig(input_dim=9, up_sample_rates=(7, 7, 6, 3, 2))
    message = refusal(network, codec=replace(network.codec, audio_decoder=decoder))
    assert "model.pretrained_audio_codec" in message and "CausalHiFiGANDecoder" in message


def test_a_conversation_beyond_its_window_runs_the_same_program_with_the_same_state():
    session, g = fresh(), golden(RUNS[0])
    size, wave = session.state_bytes, np.tile(recording(), 3)
    frames = pushed(session, wave[:5000], 5000)
    programs = session._step._cache_size()
    frames += [*pushed(session, wave[5000:], 5000), *session.finish()]
    assert len(frames) == len(wave) // 1280 + 1 > session._program.capacity == 54
    assert session.state_bytes == size
    assert session._step._cache_size() == programs
    expected = g["infer_pair/tokens_text"][0, :-1].tolist()
    assert tokens(frames)[: len(expected)] == expected
    assert len(set(tokens(frames)[60:])) > 5


def test_learnt_positions_limit_a_conversation(monkeypatch):
    network = model()._blueprint.network
    with pytest.raises(ValueError, match=r"session_window_s=0\.07"):
        opening._window(network, 0.07)
    assert opening._window(network, 0.24) == 3
    learnt = replace(network.speech_decoder, use_learnable_pos_emb=True, max_length_causal_mask=50)
    learnt = replace(network, speech_decoder=learnt)
    assert opening._window(learnt, 8.0) == learnt.max_frames == 50
    session = fresh()
    limited = replace(session._settings, max_frames=50)
    monkeypatch.setattr(session._conversation, "settings", limited)
    session.push(np.zeros(49 * 1280))
    with pytest.raises(ValueError, match="more than the 50 frames .*max_length_causal_mask"):
        session.push(np.zeros(1280))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"rope": RopeConfig(scaling=DynamicScaling(factor=2.0, original_positions=64))},
            "Dynamic",
        ),
        ({"pattern": (LayerKind(chunk=8),)}, "chunked attention"),
        ({"query_growth": 0.1}, "grows with the position"),
    ],
)
def test_an_llm_that_knows_more_than_distances_is_refused(change, reason):
    network = model()._blueprint.network
    message = refusal(network, llm=replace(network.llm, **change))
    assert "model.pretrained_llm" in message and reason in message
