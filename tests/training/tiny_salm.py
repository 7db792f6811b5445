"""A SALM of a few thousand weights with data of two lengths, as a YAML that train.py takes."""

import json
from pathlib import Path

import numpy as np
import soundfile
import yaml

DATA = Path(__file__).parents[1] / "data"
LLAMA = DATA / "llm" / "llama"
RATE_HZ = 16000
SECONDS = {"short": 0.5, "long": 1.5}


def write_config(folder, *, llm=LLAMA, trainer, exp_manager=None, seconds=SECONDS):
    """Writes recordings, a manifest and a YAML into `folder`; gives the YAML's path."""
    noise = np.random.default_rng(0)
    rows = []
    for index in range(8):
        length_s = seconds["long" if index % 3 == 2 else "short"]
        name = f"{index}.wav"
        soundfile.write(folder / name, noise.normal(0, 0.1, round(RATE_HZ * length_s)), RATE_HZ)
        rows.append({"audio_filepath": name, "duration": length_s, "text": f"yes {index}"})
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "type": "lhotse_as_conversation",
        "manifest_filepath": str(manifest),
        "audio_locator_tag": "<|audioplaceholder|>",
        "tags": {"context": "Say:"},
    }
    data = {
        "sample_rate": RATE_HZ,
        "prompt_format": "llama2",
        "token_equivalent_duration": 0.08,
        "input_cfg": [source],
    }
    recorded = json.loads((DATA / "salm" / "llama_adapter.json").read_text())["cfg_in"]
    settings = {
        "model": {
            **recorded,
            "pretrained_llm": str(llm),
            "pretrained_asr": str(DATA / "salm" / "asr.nemo"),
            "lora": {"r": 2, "lora_dropout": 0.2},
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, **trainer},
        "data": {
            "train_ds": {**data, "batch_size": 2, "shuffle": True, "seed": 1},
            "validation_ds": {"datasets": {"same": {**data, "batch_size": 4}}},
        },
        "exp_manager": {
            "explicit_log_dir": str(folder / "run"),
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "create_tensorboard_logger": False,
            **(exp_manager or {}),
        },
    }
    path = folder / "salm.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
