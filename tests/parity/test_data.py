"""Conversations, lengths, filters, batches and audio equal NeMo's dataloader and dataset."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.conversations import AudioClip, AudioTurn, Conversation, TextTurn
from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.conversions import with_silent_agent
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.data.fused_plans import FusedPlans
from speechlm2_jax.data.fusion import training_sets
from speechlm2_jax.data.loader import PlannedBatches
from speechlm2_jax.data.prepare import DataSet, prepare
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.settings import SettingsError, build
from tests.parity.recorded_configs import (
    BINS,
    BUDGETS,
    ENDLESS,
    FILTERED,
    FUSED,
    IN_ORDER,
    MIXED,
    NEMO_IS_WRONG,
    PAIRS,
    SECONDS,
    SHUFFLED,
    UNSHUFFLED,
)

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "manifests" / "dataloader.json").read_text())
TAG = "<|audioplaceholder|>"
DUPLEX = DuplexS2SDataset(
    Tokenizer(DATA / "duplex" / "assets" / "llm"),
    frame_length=0.08,
    source_sample_rate=16000,
    target_sample_rate=16000,
)
ABS_SUM_RTOL = 1e-4  # the golden has five decimals


@pytest.fixture(autouse=True)
def in_data_folder(monkeypatch):
    monkeypatch.chdir(DATA / "manifests")


def frames(samples: int) -> int:
    return -(-samples // 1280)


def dataset_for(name: str) -> SALMDataset:
    tokenizer = Tokenizer(DATA / "llm" / GOLDEN["configs"][name]["tokenizer"])
    tokenizer.add_special_tokens([TAG])
    return SALMDataset(tokenizer)


def prepared(name: str, groups: int = 1, *, is_train: bool = False, **changes):
    values = {**GOLDEN["configs"][name]["config"], **changes}
    config = build(DataLoaderConfig, values, "data.train_ds")
    sources = tuple(read_sources(config, "data.train_ds", SALMDataset.read))
    data_set = DataSet(where="data.train_ds", config=config, sources=sources, is_train=is_train)
    dataset = dataset_for(name)
    return dataset, prepare(data_set, dataset, frames, groups, 8)


def test_every_recorded_configuration_is_compared_or_named():
    alike = [*UNSHUFFLED, *ENDLESS, *SHUFFLED, *MIXED, *BUDGETS, *BINS, *PAIRS]
    named = [*alike, *SECONDS, *FILTERED, *FUSED]
    assert {*named, *NEMO_IS_WRONG} == set(GOLDEN["configs"])


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
        if "cut_ids" in expected and name != "share_gpt_webdataset":  # drawn at random there
            assert [[clip.id for clip in c.clips] for c in conversations] == expected["cut_ids"]
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


def ids_of(data, groups=0):
    return [[data.conversations[i].id for i in b.groups[groups]] for b in data.sampler.epoch(0)]


def nemos(name: str, run: str = "rank0_world1") -> list[list[str]]:
    return [batch["ids"] for batch in GOLDEN["results"][name][run]]


def flat(batches: list[list[str]]) -> list[str]:
    return sorted(i for batch in batches for i in batch)


@pytest.mark.parametrize("name", ENDLESS)
def test_streams_without_end_equal_nemo(name):
    _, data = prepared(name, is_train=True)
    batches, left, epoch = [], [], 0
    golden = [[i.partition("_repeat")[0] for i in batch] for batch in nemos(name)]
    while len(batches) < len(golden):
        planned, left = data.sampler.epoch_after(epoch, left)
        batches += [[data.conversations[i].id for i in batch.groups[0]] for batch in planned]
        epoch += 1
    if name == "shar":  # NeMo's finite set ends with a batch of what is left
        golden[-1] += batches[len(golden) - 1][len(golden[-1]) :]
    assert batches[: len(golden)] == golden


@pytest.mark.parametrize("name", SHUFFLED)
def test_shuffled_sets_hold_the_same_in_batches_of_the_same_sizes(name):
    _, data = prepared(name)
    batches, golden = ids_of(data), nemos(name)
    assert sorted(map(len, batches)) == sorted(map(len, golden))
    if data.config.drop_last:
        assert len(set(flat(batches))) == len(flat(golden))
    else:
        assert flat(batches) == flat(golden)


@pytest.mark.parametrize("name", ["bs4_shuffle", "bs5_shuffle_seed7_droplast"])
def test_shuffled_groups_have_the_sizes_of_nemos_ranks(name):
    _, data = prepared(name, groups=2)
    for rank in (0, 1):
        golden = [len(batch) for batch in nemos(name, f"rank{rank}_world2")]
        assert [len(batch) for batch in ids_of(data, rank)] == golden


@pytest.mark.parametrize("name", MIXED)
def test_finite_mixtures_hold_the_same_conversations(name):
    _, data = prepared(name)
    assert flat(ids_of(data)) == flat(nemos(name))


@pytest.mark.parametrize("name", BUDGETS)
def test_batches_keep_within_nemos_budget(name):
    _, data = prepared(name)
    assert flat(ids_of(data)) == flat(nemos(name))
    total = data.config.measure_total_length
    for batch in data.sampler.epoch(0):
        lengths = [data.conversations[i].lengths for i in batch.groups[0]]
        counted = [n.total_tokens if total else n.input_tokens for n in lengths]
        if name in IN_ORDER:
            *before, _ = costs = [data.config.cost(n) for n in counted]
            one_more = max(before, default=0) * len(costs)  # NeMo's own rule
            assert min(sum(costs), one_more) <= data.config.budget
        else:
            assert_within(len(lengths), max(counted), data.config)


@pytest.mark.parametrize("name", IN_ORDER)
def test_batches_in_order_are_filled_as_well_as_nemos(name):
    _, data = prepared(name)
    mine, theirs = ids_of(data), nemos(name)
    assert [i for batch in mine for i in batch] == [i for batch in theirs for i in batch]
    assert len(mine) <= len(theirs)
    if name == "mm_tokens":
        assert [len(batch) for batch in mine][:5] == [2, 2, 2, 2, 2]


def assert_within(rows, longest, config):
    weighed = longest + (longest**2 / config.quadratic if config.quadratic else 0)
    assert rows == 1 or rows * weighed <= config.budget
    assert config.batch_size is None or rows <= config.batch_size


@pytest.mark.parametrize("name", BINS)
def test_bins_hold_what_nemo_puts_together_and_no_batch_is_smaller(name):
    _, data = prepared(name)
    config, plan = data.config, data.sampler.plan
    assert flat(ids_of(data)) == flat(nemos(name))
    bucket_of = {c.id: b for c, b in zip(data.conversations, plan.bucket_of, strict=True)}
    for batch in GOLDEN["results"][name]["rank0_world1"]:
        assert len({bucket_of[i] for i in batch["ids"]}) == 1
    for bucket in plan.buckets:
        if config.batch_tokens is not None:
            assert bucket.shape.sequences >= config.batch_tokens // bucket.longest
        else:
            edge = next(i for i, e in enumerate(config.bucket_duration_bins) if bucket.longest <= e)
            assert bucket.shape.sequences == config.bucket_batch_size[edge]


@pytest.mark.parametrize("name", PAIRS)
def test_bins_of_input_and_output_equal_nemos(name):
    _, data = prepared(name)
    sizes, plan = data.config.bucket_batch_size, data.sampler.plan
    bin_of = dict(zip((c.id for c in data.conversations), data.contents.measures.bins, strict=True))
    golden = [batch["ids"] for batch in GOLDEN["results"][name]["rank0_world1"]]
    for ids in golden:
        (number,) = {int(bin_of[i]) for i in ids}
        assert len(ids) <= sizes[number]
    left_out = {c.id for c, b in zip(data.conversations, plan.bucket_of, strict=True) if b < 0}
    assert {*flat(golden)} == {*bin_of} - left_out == {*flat(ids_of(data))}
    assert left_out == {i for i, number in bin_of.items() if number == len(sizes)}
    numbers = sorted({int(n) for n in bin_of.values()} - {len(sizes)})
    assert [b.shape.sequences for b in plan.buckets] == [sizes[n] for n in numbers]


@pytest.mark.parametrize("name", SECONDS)
def test_cuts_measured_in_seconds_keep_within_nemos_budget(name):
    data = prepared_cuts(GOLDEN["configs"][name]["config"])
    golden = [[i for i, _ in batch] for batch in GOLDEN["results"][name]["rank0_world1"]]
    assert flat(ids_of(data)) == flat(golden)
    for batch in data.sampler.epoch(0):
        seconds = [data.conversations[i].duration_s for i in batch.groups[0]]
        if data.config.bucket_batch_size is None:
            assert_within(len(seconds), max(seconds), data.config)
    bins = data.config.bucket_duration_bins
    if bins is not None:
        edges = np.searchsorted(bins, [c.duration_s for c in data.conversations])
        plan = data.sampler.plan.bucket_of
        assert all(len({e for e, b in zip(edges, plan, strict=True) if b == n}) == 1 for n in plan)


@pytest.mark.parametrize("name", FUSED)
def test_fused_sets_equal_nemo(name):
    blocks = training_sets(GOLDEN["configs"][name]["config"], "data.train_ds")
    sets = {part: prepared_cuts(values) for part, (values, _) in blocks.sets.items()}
    for run, results in GOLDEN["results"][name].items():
        rank, groups = int(run[4]), int(run[-1])
        parts = {
            part: PlannedBatches(replace(data.sampler, groups=groups))
            for part, data in sets.items()
        }
        plans = FusedPlans(parts, blocks.fusion, 42, is_endless=False)
        golden = [[i for i, _ in batch] for batch in results]
        batches, first_set = [], []
        for _ in golden:
            fused = next(plans)
            first_set += [
                i for part in fused if part.name == "a" for g in part.plan.groups for i in g
            ]
            indices = [(sets[part.name], i) for part in fused for i in part.plan.groups[rank]]
            batches.append([data.conversations[i].id for data, i in indices])
        assert plans.get_state()["epoch"] == 0
        assert sorted(first_set) == list(range(23))
        if name == "cuts_multi_config_round_robin":
            assert batches == golden
        else:  # the incomplete batches of shuffled sets come in another place
            assert all(3 <= len(batch) <= 5 for batch in [*batches, *golden])
        next(plans)
        assert plans.get_state()["epoch"] == 1  # NeMo's epoch ends here too


def prepared_cuts(values):
    """Recordings as duplex conversations, whose planner measures seconds."""
    config = build(DuplexLoaderConfig, values, "data.train_ds")
    sources = read_sources(config, "data.train_ds", read_silent_agents)
    data_set = DataSet(where="data", config=config, sources=tuple(sources), is_train=False)
    return prepare(data_set, DUPLEX, frames, 1, 8)


def read_silent_agents(entry, _):
    conversations = SALMDataset.read(entry, build(DataLoaderConfig, {"batch_size": 1}))
    return [with_silent_agent(c, 0.0, 16000) for c in conversations]


@pytest.mark.parametrize("name", NEMO_IS_WRONG)
def test_where_nemo_is_wrong_all_but_the_fault_is_equal(name):
    if "batch_duration" in name:
        with pytest.raises(SettingsError, match="batch_duration: conversations are measured in"):
            prepared(name)
        return
    dataset, data = prepared(name)
    assert ids_of(data) == nemos(name)
    text = dataset.tokenizer.ids_to_text
    for batch in GOLDEN["results"][name]["rank0_world1"]:
        by_id = {c.id: c for c in data.conversations}
        for one, ids in zip((by_id[i] for i in batch["ids"]), batch["input_ids"], strict=True):
            theirs = text([i for i in ids if i != dataset.pad_id])
            mine = text(one.prompt.input_ids.tolist())
            assert theirs.replace("SYS [/INST] [INST] ", "") == mine


def test_estimated_bins_follow_lhotse():
    from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

    from speechlm2_jax.data.bucketing import equal_mass_edges

    class Length:
        def measure_length(self, n):
            return n

    lengths = np.random.default_rng(0).integers(20, 400, 500)
    theirs = estimate_duration_buckets(lengths, 7, Length())
    np.testing.assert_array_equal(equal_mass_edges(lengths, 7), theirs)


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
