"""A recording is the same in every form that libraries hand over; transcribe takes them all."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

import speechlm2_jax as slm
from speechlm2_jax.data.audio import AudioError, read_audio, resample
from speechlm2_jax.inference import generate
from speechlm2_jax.inference.audio_inputs import clips_of
from tests.cases.audio_case import RATE_HZ, encode, speechlike

DATA = Path(__file__).parents[1] / "data"
PARTS = Path(__file__).parents[2] / "configs" / "parts"
SPEECH = Path(__file__).parents[2] / "corpus" / "audio" / "test"
WAVE = speechlike(1.0)
PCM16_STEP = 1 / 32768


def one(audio, **more):
    (clip,) = clips_of(audio, "prompt 0", RATE_HZ, **more)
    assert clip.samples.dtype == np.float32
    return clip.samples


@pytest.mark.parametrize(
    "audio",
    [
        (RATE_HZ, WAVE),
        [RATE_HZ, WAVE],
        [(RATE_HZ, WAVE)],
        (RATE_HZ, (WAVE * 32768).astype(np.int16)),
        (RATE_HZ, (WAVE * 2.0**31).astype(np.int32)),
        (np.int64(RATE_HZ), WAVE),
        (float(RATE_HZ), np.stack([WAVE, WAVE], axis=1)),
        {"array": WAVE, "sampling_rate": RATE_HZ},
        {"array": WAVE.tolist(), "sampling_rate": RATE_HZ, "path": None},
        {"array": np.stack([WAVE, WAVE]), "sampling_rate": RATE_HZ, "path": "nowhere.wav"},
    ],
)
def test_an_array_with_its_rate_is_a_recording(audio):
    np.testing.assert_allclose(one(audio), WAVE, atol=PCM16_STEP)


def test_another_rate_is_resampled_and_channels_are_mixed_or_chosen():
    fast = speechlike(1.0, 44100)
    stereo = (32767 * np.stack([fast, -0.5 * fast], axis=1)).astype(np.int16)
    mixed = resample((stereo.astype(np.float32) / 32768).mean(axis=1), 44100, RATE_HZ)
    np.testing.assert_allclose(one((44100, stereo)), mixed, atol=1e-6)
    np.testing.assert_allclose(one((44100, stereo), channel=1), -2 * mixed, atol=2e-4)
    middle = (128 + np.round(100 * WAVE)).astype(np.uint8)
    np.testing.assert_allclose(one((RATE_HZ, middle)), WAVE * 100 / 128, atol=1 / 128)


def test_files_and_bytes_are_recordings(tmp_path):
    path = tmp_path / "a b.wav"
    soundfile.write(path, WAVE, RATE_HZ)
    expected, encoded = read_audio(path), path.read_bytes()
    for audio in (
        {"path": str(path), "bytes": None},
        {"path": "nowhere.wav", "bytes": encoded},
        {"path": None, "bytes": encoded},
        encoded,
        io.BytesIO(encoded),
        path.as_uri(),
        "data:audio/wav;base64," + base64.b64encode(encoded).decode(),
    ):
        np.testing.assert_array_equal(one(audio), expected)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ((0, WAVE), "the sample rate must be from 1000 to 768000 Hz, got 0"),
        ((2**31, WAVE), "the sample rate must be"),
        ((RATE_HZ, WAVE[:0]), "no samples"),
        ((RATE_HZ, np.full(9, np.nan)), "NaN or infinite samples"),
        ((RATE_HZ, np.full(9, 3e38)), "NaN or infinite samples"),
        ((RATE_HZ, WAVE.astype(np.uint32)), "audio is uint32"),
        ((RATE_HZ, np.zeros((2, 2, 2))), "got shape"),
        ({"array": WAVE}, "must have array and sampling_rate, or bytes, or path"),
        ({"bytes": b"no audio" * 99, "path": "a.wav"}, "Invalid data"),
        ("https://example.org/a.wav", "is not on this machine; download it"),
        ("data:audio/wav;base64,###", "is not base64"),
    ],
)
def test_what_is_no_recording_names_its_prompt(audio, message):
    with pytest.raises(ValueError, match=f"^prompt 0: .*{message}"):
        one(audio)


# Turns of parts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return slm.models.SALM.from_pretrained(DATA / "salm" / "llama_adapter_hf").eval()


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "Say:"}, {"type": "audio", "audio": WAVE}],
        [{"type": "text", "text": "Say: "}, {"type": "audio", "audio": (RATE_HZ, WAVE)}],
        ["Say:", {"audio": {"array": WAVE, "sampling_rate": RATE_HZ}}],
        [{"text": "Say:"}, {"type": "audio", "array": WAVE, "sampling_rate": RATE_HZ}],
        [
            {"type": "text", "text": "Say:"},
            {"type": "audio", "audio": WAVE, "sampling_rate": RATE_HZ},
        ],
    ],
)
def test_parts_are_the_turn_that_they_mean(model, parts):
    turn = {"role": "user", "content": f"Say: {model.audio_locator_tag}", "audio": [WAVE]}
    asked = [turn, {"role": "assistant", "content": "no"}, {"role": "user", "content": "Again."}]
    given = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        {"role": "user", "content": ["Again."]},
    ]
    inputs = generate.PromptInputs([given, asked])
    (same, expected), _ = generate.prepare_prompts(model._engine(), inputs)
    np.testing.assert_array_equal(same.tokens, expected.tokens)
    np.testing.assert_array_equal(same.audio[0], WAVE)


@pytest.mark.slow
def test_generate_stream_and_slots_take_parts(model, tmp_path):
    path = tmp_path / "phone.m4a"
    encode(path, speechlike(1.0, 44100), rate_hz=44100, container="ipod", codec="aac")
    address = {"type": "audio", "url": path.as_uri()}
    forms = [{"type": "audio", "path": str(path)}, address, {"type": "audio", "audio": path}]
    prompts = [[{"role": "user", "content": [{"type": "text", "text": "Say:"}, f]}] for f in forms]
    asked = {"max_new_tokens": 4, "eos_token_id": []}
    ids = model.generate(prompts, **asked)
    turn = {"role": "user", "content": f"Say: {model.audio_locator_tag}", "audio": str(path)}
    np.testing.assert_array_equal(ids, np.repeat(model.generate([[turn]], **asked), 3, axis=0))
    responses = [a for some in model.generate_each(prompts, **asked) for a in some]
    each = {a.number: a.ids.tolist() for a in responses}
    assert [each[n] for n in range(3)] == ids.tolist()
    pieces = list(model.stream(prompts[:1], **asked))
    assert [i for piece in pieces for i in piece.ids.tolist()] == ids[0].tolist()


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"content": [{"type": "image", "image": "a.png"}]}, "type text or audio; got 'image'"),
        ({"content": [3]}, "type text or audio; got 'int'"),
        ({"content": [{"type": "audio"}]}, "must have audio, path or url"),
        ({"content": ["a"], "audio": [WAVE]}, "not both"),
        ({"content": [{"type": "audio", "url": "http://x/a.wav"}]}, "is not on this machine"),
    ],
)
def test_other_parts_are_refused_by_name(model, turn, message):
    with pytest.raises(ValueError, match=f"^prompt 0: .*{message}"):
        model.generate([[{"role": "user", **turn}]])


# Transcribe ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    return slm.models.CTCModel.from_pretrained(PARTS / "tiny_encoder.nemo")


@pytest.fixture(scope="module", params=["ASRModel", "CTCModel"])
def asr_model(request):
    """A model that spells how long and how loud a recording is: nothing is compiled."""
    made = getattr(slm.models, request.param).from_pretrained(PARTS / "tiny_encoder.nemo")

    def decode(audio, lengths):
        loudness = (1e4 * np.abs(audio).sum(axis=1) / np.maximum(lengths, 1)).astype(int)
        rows = zip(lengths.tolist(), loudness.tolist(), strict=True)
        return [[5 + n % 97, 5 + n // 97 % 97, 5 + m % 97] for n, m in rows]

    made._decode = decode
    return made


def test_a_path_gives_the_text_of_its_samples(trained):
    path = SPEECH / "0000.ogg"
    wave = soundfile.read(path, dtype="float32")[0]
    (text,) = trained.transcribe([str(path)])
    assert trained.transcribe([wave]) == [text] == [text.text] and len(text) > 20


def test_every_form_and_mixture_gives_the_same_texts(asr_model, tmp_path):
    paths = [SPEECH / "0000.ogg", SPEECH / "0001.ogg"]
    waves = [soundfile.read(path, dtype="float32")[0] for path in paths]
    texts = asr_model.transcribe(waves)
    assert all(texts) and texts[0] != texts[1] and texts[0].text == texts[0]
    assert asr_model.transcribe(paths) == texts
    assert asr_model.transcribe([str(path) for path in paths], batch_size=1) == texts
    assert asr_model.transcribe(str(paths[1])) == texts[1:]
    assert asr_model.transcribe(waves[1]) == texts[1:]
    mixture = [{"array": waves[0], "sampling_rate": RATE_HZ}, paths[1], (RATE_HZ, waves[0])]
    assert asr_model.transcribe(mixture, verbose=False, num_workers=0) == [*texts, texts[0]]
    both = np.stack([0 * waves[1], waves[1]], axis=1)
    soundfile.write(tmp_path / "both.wav", both, RATE_HZ, subtype="FLOAT")
    assert asr_model.transcribe([tmp_path / "both.wav"], channel_selector=1) == texts[1:]
    assert asr_model.transcribe([]) == []


def test_recordings_that_cannot_be_transcribed_are_named(asr_model, tmp_path):
    with pytest.raises(AudioError, match=r"recording 1: .*nowhere\.wav: no such file"):
        asr_model.transcribe([SPEECH / "0000.ogg", "nowhere.wav"])
    with pytest.raises(ValueError, match="timestamps='phone' must be None, 'segment' or 'word'"):
        asr_model.transcribe([SPEECH / "0000.ogg"], timestamps="phone")
    with pytest.raises(TypeError, match="unknown argument 'speed'"):
        asr_model.transcribe([SPEECH / "0000.ogg"], speed=2)
    with pytest.raises(ValueError, match="channel_selector='left'"):
        asr_model.transcribe([SPEECH / "0000.ogg"], channel_selector="left")
    with pytest.raises(ValueError, match="batch_size=0"):
        asr_model.transcribe([SPEECH / "0000.ogg"], batch_size=0)


@pytest.fixture
def asked(monkeypatch):
    """Records the calls of SALM.generate; its responses are the lengths of the recordings."""
    calls = []

    def generate(self, prompts, **options):
        calls.append((prompts, options))
        lengths = [len(turn["audio"][0]) % 300 for (turn,) in prompts]
        return np.asarray([[n, self.text_eos_id, self.text_pad_id] for n in lengths], np.int32)

    monkeypatch.setattr(slm.models.SALM, "generate", generate)
    return calls


def test_a_salm_transcribes_paths(model, asked):
    paths = [SPEECH / "0000.ogg", SPEECH / "0001.ogg", SPEECH / "0002.ogg"]
    waves = [soundfile.read(path, dtype="float32")[0] for path in paths]
    given = [paths[0], waves[1], (RATE_HZ, waves[2])]
    texts = model.transcribe(given, batch_size=2, max_new_tokens=6)
    assert texts == [model.tokenizer.ids_to_text([len(wave) % 300]).strip() for wave in waves]
    assert [len(prompts) for prompts, _ in asked] == [2, 1]
    given_options = {"max_new_tokens": 6, "max_audio_s": False}
    assert all(options == given_options for _, options in asked)
    ((turn,), _), _ = asked[0]
    assert turn["content"] == f"Transcribe the following: {model.audio_locator_tag}"
    request = f"Say {model.audio_locator_tag} again"
    assert model.transcribe(str(paths[0]), prompt=request, seed=3) == texts[:1]
    ((turn,),), options = asked[-1]
    assert turn["content"] == request
    assert options == {**given_options, "seed": 3, "max_new_tokens": 128}
    with pytest.raises(ValueError, match="num_return_sequences is not supported"):
        model.transcribe(paths, num_return_sequences=2)
    with pytest.raises(AudioError, match=r"recording 2: .*nowhere\.wav"):
        model.transcribe([*paths[:2], "nowhere.wav"], batch_size=2)


@pytest.mark.slow
def test_a_salms_transcript_is_its_response(model):
    path = SPEECH / "0000.ogg"
    (text,) = model.transcribe(path, max_new_tokens=6)
    turn = {"role": "user", "content": f"Transcribe the following: {model.audio_locator_tag}"}
    ids = model.generate([[{**turn, "audio": [path]}]], max_new_tokens=6)[0]
    assert text == model.tokenizer.ids_to_text(ids).strip()
