"""A small corpus on disk, and data modules over it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data import DataModule, SALMDataset, Tokenizer
from tests.data_pipeline.small_corpus import TAG, frames, write_manifest

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """30 recordings of 0.1 to 1.6 s with their manifest, in a folder."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(7)
    rows = []
    for n in range(30):
        samples = int(random.integers(1600, 25600))
        wave = random.uniform(-0.3, 0.3, samples).astype(np.float32)
        soundfile.write(folder / f"clip{n:02d}.wav", wave, 16000)
        text = "word " * int(random.integers(1, 9))
        rows.append(
            {"audio_filepath": f"clip{n:02d}.wav", "duration": samples / 16000, "text": text}
        )
    write_manifest(folder / "manifest.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with the audio tag."""
    tokenizer = Tokenizer(DATA / "llm" / "qwen3")
    tokenizer.add_special_tokens([TAG])
    return tokenizer


@pytest.fixture(scope="session")
def make_module(tokenizer):
    """Makes a data module over a manifest that is ready to give batches."""

    def make(manifest, groups=1, validation=(), **settings):
        entry = {"type": "lhotse_as_conversation", "manifest_filepath": str(manifest)}
        common = {"prompt_format": "qwen", "token_equivalent_duration": 0.08}
        train = {**common, "input_cfg": [entry], "seed": 3, "shuffle": True, **settings}
        if not {"batch_size", "batch_tokens"} & set(settings):
            train["batch_size"] = 4
        cfg = {"train_ds": train}
        if validation:
            sets = {name: {"input_cfg": [entry]} for name in validation}
            cfg["validation_ds"] = {**common, "batch_size": 4, "datasets": sets}
        module = DataModule(cfg, tokenizer, SALMDataset(tokenizer))
        module.setup(frame_count=frames, groups=groups)
        return module

    return make
