"""Conversations, lengths, filters, batches and audio equal NeMo's dataloader and dataset."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import AudioClip, AudioTurn, Conversation, TextTurn
from speechlm2_jax.data.prepare import DataSet, prepare
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.settings import build

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "manifests" / "dataloader.json").read_text())
TAG = "<|audioplaceholder|>"
LLM_OF = {"llama": "llama", "qwen3": "qwen3"}
UNSHUFFLED = [
    "bs4",
    "bs3_qwen",
    "bs4_max_duration",
    "conv_jsonl_finite",
    "conv_jsonl_finite_context_tag",
    "nemo_manifest",
    "nemo_manifest_tags_override_context",
]
FILTERED = ["mm_tokens_min_max_tokens", "mm_tokens_max_tpt", "bs4_max_duration"]
ABS_SUM_RTOL = 1e-4  # the golden has five decimals


@pytest.fixture(autouse=True)
def in_data_folder(monkeypatch):
    monkeypatch.chdir(DATA / "manifests")


def frames(samples: int) -> int:
    return -(-samples // 1280)


def dataset_for(name: str) -> SALMDataset:
    tokenizer = Tokenizer(DATA / "llm" / LLM_OF[GOLDEN["configs"][name]["tokenizer"]])
    tokenizer.add_special_tokens([TAG])
    return SALMDataset(tokenizer)


def prepared(name: str, groups: int = 1, **changes):
    values = {**GOLDEN["configs"][name]["config"], **changes}
    config = build(DataLoaderConfig, values, "data.train_ds")
    sources = tuple(read_sources(config, "data.train_ds", SALMDataset.read))
    data_set = DataSet(where="data.train_ds", config=config, sources=sources, is_train=False)
    dataset = dataset_for(name)
    return dataset, prepare(data_set, dataset, frames, groups, 8)


def lengths_of(conversation: Conversation) -> list[int]:
    n = conversation.lengths
    return [n.input_tokens, n.output_tokens, n.total_tokens]


@pytest.mark.parametrize("name", UNSHUFFLED)
def test_batches_of_a_set_that_is_not_shuffled_equal_nemo(name):
    dataset, data = prepared(name)
    batches = [batch.groups[0] for batch in data.sampler.epoch(0)]
    golden = GOLDEN["results"][name]["rank0_world1"]
    assert len(batches) == len(golden)
    for indices, expected in zip(batches, golden, strict=True):
        conversations = [data.conversations[i] for i in indices]
        assert [c.id for c in conversations] == expected["ids"]
        measured = [lengths_of(c) for c in conversations]
        if not isinstance(expected["lengths"][0], list):
            measured = [total for _, _, total in measured]
        assert measured == expected["lengths"]
        assert_collated_equal(dataset[conversations], expected)


def assert_collated_equal(batch, expected):
    assert list(batch["audios"].shape) == expected["audios_shape"]
    assert batch["audio_lens"].tolist() == expected["audio_lens"]
    if "input_ids" in expected:
        assert batch["input_ids"].tolist() == expected["input_ids"]
        mask = ["".join("01"[int(m)] for m in row) for row in batch["loss_mask"]]
        assert mask == expected["loss_mask"]
        sums = np.abs(batch["audios"]).sum(axis=1)
        np.testing.assert_allclose(sums, expected["audio_abs_sum"], rtol=ABS_SUM_RTOL)


def test_groups_are_what_nemo_ranks_get():
    _, data = prepared("bs4", groups=2)
    for rank in (0, 1):
        golden = GOLDEN["results"]["bs4"][f"rank{rank}_world2"]
        batches = [batch.groups[rank] for batch in data.sampler.epoch(0)]
        ids = [[data.conversations[i].id for i in batch] for batch in batches]
        assert ids == [expected["ids"] for expected in golden]


@pytest.mark.parametrize("name", FILTERED)
def test_filters_keep_what_nemo_keeps(name):
    _, data = prepared(name)
    golden = GOLDEN["results"][name]["rank0_world1"]
    assert {c.id for c in data.conversations} == {i for batch in golden for i in batch["ids"]}
    assert sum(data.filtered.values()) == 23 - len(data.conversations)


@pytest.mark.parametrize("name", ["mm_bucketing_bins", "mm_bucket_batch_size_1d"])
def test_bins_hold_what_nemo_puts_together_and_no_batch_is_smaller(name):
    _, data = prepared(name)
    config, plan = data.config, data.sampler.plan
    bucket_of = {c.id: b for c, b in zip(data.conversations, plan.bucket_of, strict=True)}
    for batch in GOLDEN["results"][name]["rank0_world1"]:
        assert len({bucket_of[i] for i in batch["ids"]}) == 1
    for bucket in plan.buckets:
        if config.batch_tokens is not None:
            assert bucket.shape.sequences >= config.batch_tokens // bucket.longest
        else:
            edge = next(i for i, e in enumerate(config.bucket_duration_bins) if bucket.longest <= e)
            assert bucket.shape.sequences == config.bucket_batch_size[edge]


def test_estimated_bins_follow_lhotse():
    from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

    from speechlm2_jax.data.bucketing import _equal_mass_edges

    class Length:
        def measure_length(self, n):
            return n

    lengths = np.random.default_rng(0).integers(20, 400, 500)
    theirs = estimate_duration_buckets(lengths, 7, Length())
    np.testing.assert_array_equal(_equal_mass_edges(lengths, 7), theirs)


def test_shar_gives_the_conversations_and_samples_of_nemo():
    dataset, data = prepared("shar", shuffle=False)
    by_id = {c.id: c for c in data.conversations}
    for expected in GOLDEN["results"]["shar"]["rank0_world1"]:
        conversations = [by_id[i] for i in expected["ids"]]
        assert [c.lengths.total_tokens for c in conversations] == expected["lengths"]
        assert dataset[conversations]["audio_lens"].tolist() == expected["audio_lens"]


def test_weights_and_temperatures_of_groups_multiply_out():
    _, data = prepared("mux_group_temperature", force_finite=None)
    assert data.sampler.shares is None  # a finite set is gone through once
    config = build(DataLoaderConfig, GOLDEN["configs"]["mux_group_temperature"]["config"])
    shares = [source.share for source in read_sources(config, "data", SALMDataset.read)]
    np.testing.assert_allclose(shares, [0.75, 0.25])  # 9 and 1 to the power of 0.5


@pytest.mark.parametrize("run", ["llama_adapter", "qwen3_lora"])
def test_conversations_of_the_salm_runs_equal_nemo(run):
    golden = json.loads((DATA / "salm" / f"{run}.json").read_text())
    settings = golden["cfg_in"]
    tokenizer = Tokenizer(DATA / "llm" / Path(settings["pretrained_llm"]).name)
    tokenizer.add_special_tokens([TAG])
    dataset = SALMDataset(tokenizer)
    conversations = dataset.encode(
        [conversation(c) for c in golden["conversations"]], settings["prompt_format"]
    )
    for made, expected in zip(conversations, golden["conversations"], strict=True):
        assert made.prompt.input_ids.tolist() == expected["input_ids"]
        assert made.prompt.mask.astype(int).tolist() == expected["mask"]
        assert made.prompt.context_ids.tolist() == expected["context_ids"]
        assert made.prompt.answer_ids.tolist() == expected["answer_ids"]
        assert tokenizer.ids_to_text(made.prompt.input_ids, False) == expected["decoded"]
        lengths = [expected[f"{part}_length"] for part in ("input", "output", "total")]
        assert lengths_of(made) == lengths
    batch, tensors = dataset[conversations], load_file(DATA / "salm" / f"{run}.safetensors")
    for key in ("input_ids", "loss_mask", "audios", "audio_lens"):
        np.testing.assert_array_equal(batch[key], tensors[f"batch/{key}"])


def conversation(golden) -> Conversation:
    turns = [audio_turn(t) if "audio" in t else text_turn(t) for t in golden["turns"]]
    return Conversation(id=golden["id"], turns=tuple(turns), token_equivalent_duration_s=0.08)


def text_turn(turn) -> TextTurn:
    return TextTurn(role=turn["role"], text=turn["value"])


def audio_turn(turn) -> AudioTurn:
    path = DATA / "salm" / "audio" / f"{turn['audio']}.wav"
    duration_s = soundfile.info(str(path)).duration
    clip = AudioClip(id=turn["audio"], path=str(path), duration_s=duration_s)
    return AudioTurn(role=turn["role"], clip=clip, locator_tag=TAG)
