"""Invalid prompts raise a one-line ValueError with their number; nothing is generated."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.inference import generate
from speechlm2_jax.inference.audio_inputs import split_audio
from speechlm2_jax.models import SALM

DATA = Path(__file__).parents[1] / "data"
FILE = DATA / "salm" / "audio" / "a0.wav"
WAVE = soundfile.read(FILE, dtype="float32")[0]


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(DATA / "salm" / "llama_adapter_hf").eval()


@pytest.fixture
def asked(model):
    """Lays out one good prompt and one with this audio, as `generate` does."""

    def lay_out(audio, first=0, tags=1):
        text = f"Say: {model.audio_locator_tag * tags}"
        good = {"role": "user", "content": f"Say: {model.audio_locator_tag}", "audio": [WAVE]}
        turn = {"role": "user", "content": text, "audio": audio}
        return generate.prepare_prompts(
            model._engine(), generate.PromptInputs([[good], [turn]]), first
        )[0]

    return lay_out


@pytest.mark.parametrize(
    "audio",
    [str(FILE), FILE, WAVE, [FILE], (WAVE,), [WAVE.astype(np.float64)], [WAVE.astype(np.float32)]],
    ids=["str", "Path", "array", "paths", "tuple", "float64", "float32"],
)
def test_one_recording_in_every_form_is_the_same(asked, audio):
    (wave,) = asked(audio)[1].audio
    assert wave.dtype == np.float32
    np.testing.assert_array_equal(wave, WAVE)


def test_no_audio_is_none(asked):
    assert asked(None, tags=0)[1].audio == ()


def _with(value):
    wave = WAVE.copy()
    wave[100] = value
    return [wave]


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (_with(np.nan), "^prompt 1: NaN or infinite samples"),
        (_with(-np.inf), "^prompt 1: NaN or infinite samples"),
        ([np.full(900, 1e300)], "^prompt 1: NaN or infinite samples"),
        ([np.zeros(0, np.float32)], "^prompt 1: no samples"),
        ([FILE, _with(np.nan)[0]], "^prompt 1, clip 1: NaN or infinite samples"),
        (["nowhere.wav"], "^prompt 1: .*nowhere.wav"),
        (np.stack([WAVE, WAVE], 1), r"^prompt 1: audio must be .*\[S\]; .*: mix channels first"),
        ([np.stack([WAVE, WAVE])], r"^prompt 1: audio must be .*\[S\]; .*: mix channels first"),
        (
            [0.1, 0.2],
            r"^prompt 1, clip 0: audio must be paths or 1-D float arrays \[S\]; got float",
        ),
        ([[0.1, 0.2]], r"^prompt 1: audio must be paths or 1-D float arrays \[S\]; got list"),
        (3, r"^prompt 1: audio must be paths or 1-D float arrays \[S\]; got int"),
        ({"array": WAVE}, r"^prompt 1: audio must be paths or 1-D float arrays \[S\]; got dict"),
        ([None], r"^prompt 1: audio must be paths or 1-D float arrays \[S\]; got NoneType"),
        ([np.array(["a"])], "^prompt 1: audio must be float samples"),
        ([(WAVE * 32767).astype(np.int16)], "^prompt 1: audio is int16.*divide int16 samples by"),
        ([FILE, FILE], "^prompt 1 has 1 audio placeholders but 2 audio clips were given"),
    ],
)
def test_audio_that_cannot_be_used_names_its_prompt(asked, audio, message):
    with pytest.raises(ValueError, match=message):
        asked(audio)


def test_clips_are_not_taken_from_a_neighbour(model):
    tag = model.audio_locator_tag
    both = [{"role": "user", "content": tag, "audio": [FILE, FILE]}]
    none = [{"role": "user", "content": tag}]
    with pytest.raises(ValueError, match="prompt 0 has 1 audio placeholders but 2 audio clips"):
        model.generate([both, none])


TURN = {"role": "user", "content": "Yes"}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (TURN, r"prompts must be dialogs, \[\[.*got dict"),
        ("Yes", "prompts must be dialogs, .*got str"),
        (["Yes"], "got a list of texts"),
        ([TURN], "this is one dialog: wrap it in a list"),
        ([[TURN], []], "prompt 1 must be a dialog: a list of at least one turn"),
        ([[TURN], [TURN, "Yes"]], "prompt 1 must be a dialog: a list of at least one turn"),
        ([[TURN], [{"content": "Yes"}]], "prompt 1: .* has no role 'None'"),
        ([[3, 4], [5]], "prompts of ids must be one array .* on the left with the id 0"),
        ([3, 4], r"prompts must be dialogs, .* got int64 \(2,\)"),
        ([[0.5]], r"prompts must be dialogs, .* got float64 \(1, 1\)"),
        (
            [[3, 4], [5, 368]],
            r"prompt 1: \[368\] are not token ids; give ids from 0 to 367, and 360",
        ),
        ([[3, -100]], r"prompt 0: \[-100\] are not token ids"),
    ],
)
def test_what_is_no_prompt_is_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts)


def test_rows_of_audios_are_checked_too(model):
    tag = [{"role": "user", "content": model.audio_locator_tag}]
    with pytest.raises(ValueError, match="^prompt 1: NaN or infinite samples"):
        model.generate([tag, tag], np.stack([WAVE, _with(np.nan)[0]]))
    padded = np.stack([WAVE, np.where(np.arange(len(WAVE)) < 5000, WAVE, np.nan)])
    inputs = generate.PromptInputs([tag, tag], padded, [len(WAVE), 5000])
    generate.prepare_prompts(model._engine(), inputs)  # NaN in padding is harmless
    with pytest.raises(ValueError, match="audios: audio is int16"):
        split_audio(np.zeros((1, 9), np.int16), None)
    with pytest.raises(ValueError, match="pad the clips to one length and give audio_lens"):
        split_audio([WAVE, WAVE[:9]], None)


def test_a_recording_without_a_frame_is_told(model, asked, caplog):
    short = next(n for n in range(1, len(WAVE)) if model.frame_count(n + 1))
    asked([WAVE[: short + 1]])
    assert not caplog.records
    asked([WAVE[:short]], first=4)
    assert f"prompt 5: a recording of {short} samples is shorter than one frame" in caplog.text
