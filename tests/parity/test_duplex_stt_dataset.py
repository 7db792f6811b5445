"""Channels, prompts and texts equal NeMo's DuplexSTTDataset, times of words included."""

import json

import pytest

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.duplex.conversations import ChannelIds, FrameGrid, SpokenTurn
from speechlm2_jax.data.duplex.stt_channel import WordTimes, stt_channel
from speechlm2_jax.data.duplex.stt_dataset import DuplexSTTDataset
from speechlm2_jax.data.tokenizer import Tokenizer
from tests.parity.duplex_golden import DATA

FOLDER = DATA / "dataset"
CUTS = json.loads((FOLDER / "dataset.json").read_text())
GOLDEN = json.loads((DATA / "duplex_stt" / "dataset.json").read_text())


@pytest.fixture(scope="module")
def cuts():
    from lhotse import MonoCut, Recording, SupervisionSegment

    made = []
    for golden in CUTS["cuts"]:
        name, source = golden["id"], Recording.from_file(FOLDER / golden["source_wav"])
        turns = [
            SupervisionSegment(
                id=f"{name}-{n}",
                recording_id=source.id,
                start=turn["start"],
                duration=turn["duration"],
                text=GOLDEN["timed"].get(name, turn["text"].replace("<|9|>", ""))
                if turn["speaker"].lower() == "user"
                else turn["text"],
                speaker=turn["speaker"],
            )
            for n, turn in enumerate(golden["supervisions"])
        ]
        prompt = GOLDEN["prompts"].get(name)
        made.append(
            MonoCut(
                id=name,
                start=0.0,
                duration=golden["duration"],
                channel=0,
                recording=source,
                supervisions=turns,
                custom={"system_prompt": prompt} if prompt else {},
            )
        )
    return made


@pytest.mark.parametrize("number", range(len(GOLDEN["results"])))
def test_collated_batches_equal_nemo(number, cuts):
    expected = GOLDEN["results"][number]
    dataset = DuplexSTTDataset(
        Tokenizer(DATA / "assets" / "llm"),
        *(CUTS["frame_length"], 16000),
        **CUTS["roles"],
        has_user_text=expected["model"]["predict_user_text"],
        **expected["data"],
    )
    batch = dataset[cuts]
    for name in ("target_token", "source_token", "prompt_token"):
        assert batch[f"{name}s"].tolist() == expected[f"{name}s"], name
        assert batch[f"{name}_lens"].tolist() == expected[f"{name}_lens"], name
    assert batch["source_audio_lens"].tolist() == expected["source_audio_lens"]
    assert batch["sample_id"] == expected["sample_id"]
    # NeMo leaves times and double spaces in the agent's references
    assert batch["target_texts"] == [" ".join(text.split()) for text in expected["target_texts"]]


def test_a_word_without_its_times_is_an_error():
    turn = SpokenTurn(speaker="user", start_s=0.0, end_s=0.8, text="<|1|> two words <|5|>")
    grid = FrameGrid(frame_length_s=0.08, sample_rate_hz=16000)
    ids = ChannelIds(bos=1, eos=2, pad=0)
    with pytest.raises(AudioError, match="2 words need 4 times, got 2"):
        stt_channel([turn], 20, grid=grid, text_to_ids=lambda _: [5], ids=ids, words=WordTimes())
