"""Channels, texts, lengths and audio of two voices equal NeMo's DuplexS2SDataset."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from speechlm2_jax.data.bucketing import plan_buckets
from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.conversations import DuplexConversation, clean_text
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.data.duplex.readers import duplex_conversation
from speechlm2_jax.data.prepare import kept
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.settings import build

DATA = Path(__file__).parents[1] / "data" / "duplex"
FOLDER = DATA / "dataset"
GOLDEN = json.loads((FOLDER / "dataset.json").read_text())
BATCHES = GOLDEN["batches"]
DATALOADER = json.loads((DATA.parent / "manifests" / "dataloader.json").read_text())
USER_HZ, AGENT_HZ = 16000, 22050


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(DATA / "assets" / "llm")


@pytest.fixture(scope="module")
def cuts():
    from lhotse import MonoCut, Recording, SupervisionSegment

    made = {}
    for golden in GOLDEN["cuts"]:
        source, target = (
            Recording.from_file(FOLDER / golden[f"{voice}_wav"]) for voice in ("source", "target")
        )
        turns = [
            SupervisionSegment(
                id=f"{golden['id']}-{n}",
                recording_id=source.id,
                start=turn["start"],
                duration=turn["duration"],
                text=turn["text"],
                speaker=turn["speaker"],
            )
            for n, turn in enumerate(golden["supervisions"])
        ]
        made[golden["id"]] = MonoCut(
            id=golden["id"],
            start=0.0,
            duration=golden["duration"],
            channel=0,
            recording=source,
            supervisions=turns,
            custom={"target_audio": target},
        )
    return made


def dataset_of(tokenizer, frame_length=0.08):
    return DuplexS2SDataset(tokenizer, frame_length, USER_HZ, AGENT_HZ, **GOLDEN["roles"])


def assert_collated_equal(batch, expected):
    for key in ("target_tokens", "source_tokens", "target_token_lens", "source_token_lens"):
        if key in expected:
            assert batch[key].tolist() == expected[key], key
    for key in ("source_audio_lens", "target_audio_lens", "target_texts"):
        if key in expected:
            assert list(batch[key]) == expected[key], key


@pytest.mark.parametrize("name", ["all", "pair", "rest"])
def test_collated_batches_equal_nemo(name, cuts, tokenizer):
    expected = BATCHES[name]
    batch = dataset_of(tokenizer)[[cuts[i] for i in expected["cut_ids"]]]
    assert_collated_equal(batch, expected)
    for i, cut in enumerate(expected["cut_ids"]):
        for voice in ("source", "target"):
            path = FOLDER / "audio" / f"{cut}_{voice}.flac"
            wave, _ = soundfile.read(path, dtype="float32")  # NeMo's batch holds these samples
            row = batch[f"{voice}_audio"][i]
            np.testing.assert_array_equal(row[: len(wave)], wave)
            assert not row[len(wave) :].any()


@pytest.mark.parametrize("name", [n for n in BATCHES if n.startswith("all_fl")])
def test_frames_follow_the_rate_of_the_cut(name, cuts, tokenizer):
    """A cut that Lhotse resamples, and the rate of the settings, mean the same."""
    expected = BATCHES[name]
    dataset, rate_hz = (
        dataset_of(tokenizer, expected["frame_length"]),
        expected["cut_sampling_rate"],
    )
    resampled = [cut.resample(rate_hz) for cut in cuts.values()]
    assert_collated_equal(dataset[resampled], expected)
    conversations = [duplex_conversation(cut) for cut in cuts.values()]
    for n, conversation in enumerate(conversations):
        example = dataset.example(conversation, rate_hz)
        length = expected["target_token_lens"][n]
        assert example.target_tokens.tolist() == expected["target_tokens"][n][:length]
        assert example.source_tokens.tolist() == expected["source_tokens"][n][:length]
        assert len(example.source_audio) == expected["source_audio_lens"][n]
        assert len(example.target_audio) == expected["target_audio_lens"][n]


def test_the_users_audio_goes_by_way_of_the_rate_of_the_settings(cuts, tokenizer):
    golden = load_file(FOLDER / "resampled_source.safetensors")["source_audio_via_22050"]
    dataset = dataset_of(tokenizer)
    for cut, expected in zip(cuts.values(), golden, strict=False):
        made = dataset.example(duplex_conversation(cut), AGENT_HZ).source_audio
        by_lhotse = dataset[[cut.resample(AGENT_HZ)]]["source_audio"][0]
        np.testing.assert_array_equal(made, by_lhotse)
        np.testing.assert_allclose(made[: len(expected)], expected, atol=1e-6)


@pytest.mark.parametrize("text", list(GOLDEN["strip_timestamps"]))
def test_timestamps_are_stripped_as_nemo_does(text):
    assert clean_text(text) == GOLDEN["strip_timestamps"][text]


@pytest.mark.parametrize("text", list(GOLDEN["text_to_ids"]))
def test_texts_are_tokenised_as_nemo_does(text, tokenizer):
    assert tokenizer.text_to_ids(text) == GOLDEN["text_to_ids"][text]


def contents_of(name, tokenizer):
    """The cuts of NeMo's batches of one configuration, with its settings."""
    config = build(DuplexLoaderConfig, DATALOADER["configs"][name]["config"])
    everything = dict(
        item
        for golden in ("cuts_batch_duration", name)
        for batch in DATALOADER["results"][golden]["rank0_world1"]
        for item in batch
    )
    conversations = []
    for cut, seconds in everything.items():
        clip = AudioClip(id=cut, path="", duration_s=seconds)
        conversations.append(
            DuplexConversation(
                id=cut,
                duration_s=seconds,
                sample_rate_hz=16000,
                source=clip,
                target=clip,
                turns=(),
            )
        )
    return dataset_of(tokenizer).contents(conversations, config, lambda n: n // 1280, name)


@pytest.mark.parametrize(
    "name",
    [
        "cuts_batch_duration_bucketing_bins",
        "cuts_batch_duration_bucketing_bins_quadratic",
        "cuts_bucket_batch_size",
    ],
)
def test_bins_of_seconds_hold_what_nemo_puts_together_and_no_batch_is_smaller(name, tokenizer):
    contents = contents_of(name, tokenizer)
    config, plan = contents.config, plan_buckets(contents.measures, contents.config, contents.shape)
    bucket_of = dict(zip((c.id for c in contents.conversations), plan.bucket_of, strict=True))
    for batch in DATALOADER["results"][name]["rank0_world1"]:
        assert len({bucket_of[cut] for cut, _ in batch}) == 1
    for index, bucket in enumerate(plan.buckets):
        counts = bucket.longest
        if config.quadratic_duration is not None:
            counts += bucket.longest**2 / config.quadratic_duration
        if config.batch_duration is not None:
            assert bucket.shape.sequences == max(config.batch_duration // counts, 1)
        else:
            assert bucket.shape.sequences == config.bucket_batch_size[index]


def test_limits_in_seconds_keep_what_nemo_keeps(tokenizer):
    name = "cuts_max_duration_linspace_bins"
    contents = contents_of(name, tokenizer)
    keep, _ = kept(contents)
    left = {c.id for c, passes in zip(contents.conversations, keep, strict=True) if passes}
    assert left == {cut for b in DATALOADER["results"][name]["rank0_world1"] for cut, _ in b}
    assert len(left) < len(contents.conversations)
