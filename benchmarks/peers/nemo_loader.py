"""Times NeMo's own Lhotse data loader on the settings of `benchmarks.loader_peer`.

    python benchmarks/peers/nemo_loader.py SETTINGS.json --workers 2

Runs in an environment with nemo_toolkit 3.0.0 (torch), without this package. SETTINGS.json has
`train_ds`, the directory of the tokenizer, and the batches to read. Prints one line of JSON.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import argparse
import json
import resource
import time

import torch
from nemo.collections.common.data.fallback import FallbackDataset
from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.speechlm2.data import SALMDataset
from omegaconf import OmegaConf

TAG = "<|audioplaceholder|>"


def main() -> None:
    """Reads batches, and counts seconds of audio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    settings = json.loads(arguments.settings.read_text())
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer(settings["tokenizer"], use_fast=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [TAG]})
    loader = get_lhotse_dataloader_from_config(
        OmegaConf.create({**settings["train_ds"], "num_workers": arguments.workers}),
        global_rank=0,
        world_size=1,
        dataset=FallbackDataset(SALMDataset(tokenizer)),
        tokenizer=tokenizer,
    )
    batches = iter(loader)
    for _ in range(settings["warmup"]):
        next(batches)
    begin, used = time.perf_counter(), _processor_s()
    samples = rows = held = 0
    for _ in range(settings["batches"]):
        batch = next(batches)
        samples += int(batch["audio_lens"].sum())
        rows += len(batch["input_ids"])
        held += batch["audios"].numel()
    taken_s = time.perf_counter() - begin
    result = {
        "audio_s_per_s": samples / 16000 / taken_s,
        "taken_s": taken_s,
        "processor_s": _processor_s() - used,
        "rows": rows,
        "audio_s": samples / 16000,
        "padding": 1 - samples / held,
    }
    print(json.dumps(result), flush=True)


def _processor_s() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


if __name__ == "__main__":
    main()
