"""Overfits sixteen conversations: the user has one sentence, the agent responds with another.

    python -m tests.models.duplex_overfit FOLDER [--kind s2s_duplex_speech_decoder] [key=value ...]

writes them and a tiny model's components to FOLDER, trains, runs the model without teacher forcing,
and prints the share of correct text and codes in the agent's turns.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from speechlm2_jax import experiment
from speechlm2_jax.batches import DuplexExample
from speechlm2_jax.data.audio import resample
from speechlm2_jax.models.duplex import DuplexS2SModel

ROOT = Path(__file__).parents[2]
PARTS = ROOT / "tests" / "data" / "duplex" / "assets"
COUNT = 16
PAUSE_S = 0.32
LLM = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SPEECH_DECODER = {
    "n_layers": 2,
    "d_model": 128,
    "d_ffn": 256,
    "sa_n_heads": 4,
    "kernel_size": 3,
    "is_causal": True,
    "max_length_causal_mask": 256,
    "use_learnable_pos_emb": True,
    "cond_on_prev_audio_tokens": True,
}


def write_conversations(folder: Path, count: int = COUNT) -> Path:
    """Makes Lhotse cuts of recordings of the bundled corpus: the user's, a pause, the agent's."""
    import soundfile
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    rows = [json.loads(line) for line in (ROOT / "corpus" / "test.jsonl").open()]
    rows = sorted(rows, key=lambda row: row["duration"])[: 2 * count]
    cuts = []
    for n, (user_row, agent_row) in enumerate(zip(rows[:count], rows[count:], strict=True)):
        user_wave, agent_wave = (_read(row) for row in (user_row, agent_row))
        start = len(user_wave) / 16000 + PAUSE_S
        total = start + len(agent_wave) / 16000 + PAUSE_S
        user, agent = (np.zeros(round(total * rate), np.float32) for rate in (16000, 22050))
        user[: len(user_wave)] = user_wave
        voice = resample(agent_wave, 16000, 22050)
        agent[round(start * 22050) :][: len(voice)] = voice[: len(agent) - round(start * 22050)]
        for name, wave, rate in (("user", user, 16000), ("agent", agent, 22050)):
            soundfile.write(folder / f"{name}{n}.wav", wave, rate)
        source = Recording.from_file(folder / f"user{n}.wav")
        ends = start + len(agent_wave) / 16000
        cuts.append(
            MonoCut(
                id=f"conversation{n}",
                start=0,
                duration=source.duration,
                channel=0,
                recording=source,
                custom={"target_audio": Recording.from_file(folder / f"agent{n}.wav")},
                supervisions=[
                    SupervisionSegment(
                        *(f"{n}u", source.id, 0.0, len(user_wave) / 16000),
                        text=user_row["text"],
                        speaker="user",
                    ),
                    SupervisionSegment(
                        *(f"{n}a", source.id, start, ends - start),
                        text=agent_row["text"],
                        speaker="agent",
                    ),
                ],
            )
        )
    path = folder / "conversations.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    return path


def write_config(folder: Path, cuts: Path, kind: str) -> Path:
    """NeMo's keys for a tiny model on these conversations."""
    llm = folder / "llm"
    llm.mkdir(exist_ok=True)
    (llm / "config.json").write_text(json.dumps(LLM))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PARTS / "llm" / name, llm / name)
    golden = json.loads((PARTS.parent / "duplex_s2s" / "cfg_input.json").read_text())
    model: dict[str, Any] = {
        **golden,
        "pretrained_llm": str(llm),
        "pretrained_audio_codec": str(PARTS / "codec.nemo"),
        "pretrained_asr": str(PARTS / "asr_streaming.nemo"),
        "scoring_asr": None,
        "pretrained_weights": False,
        "optimizer": {**golden["optimizer"], "lr": 3e-3},
        "lr_scheduler": {
            "_target_": "nemo.core.optim.lr_scheduler.CosineAnnealing",
            "warmup_steps": 40,
            "min_lr": 1e-5,
            "max_steps": "${trainer.max_steps}",
        },
    }
    if kind == "s2s_duplex_speech_decoder":
        model["speech_decoder"] = SPEECH_DECODER
    loader = {"sample_rate": 22050, "batch_size": COUNT, "cuts_path": str(cuts), "seed": 1}
    config = {
        "model": model,
        "trainer": {
            "devices": 1,
            "accelerator": "cpu",
            "max_steps": 300,
            "limit_train_batches": 150,
            "val_check_interval": 150,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 25,
            "gradient_clip_val": 1.0,
            "precision": "32-true",
        },
        "data": {
            "frame_length": 0.08,
            "source_sample_rate": 16000,
            "target_sample_rate": 22050,
            "input_roles": ["user"],
            "output_roles": ["agent"],
            "train_ds": loader,
            "validation_ds": {
                "sample_rate": 22050,
                "batch_size": COUNT,
                "seed": 1,
                "datasets": {"same": {"cuts_path": str(cuts)}},
            },
        },
        "exp_manager": {
            "explicit_log_dir": str(folder / kind),
            "checkpoint_callback_params": {"monitor": "val_loss", "mode": "min"},
        },
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_running_accuracy(model: DuplexS2SModel, examples: list[DuplexExample]) -> dict[str, float]:
    """Accuracy of text and codes in the agent's turns, of the model and of a silent agent.

    Text is compared where a token is due; codes from the frame after a turn's begin to its end,
    averaged over codebooks. `silent` is what an output of pads and silence would score.
    """
    lengths = np.array([len(e.source_audio) for e in examples], np.int32)
    audio = np.zeros((len(examples), lengths.max()), np.float32)
    for row, example in zip(audio, examples, strict=True):
        row[: len(example.source_audio)] = example.source_audio
    result = model.offline_inference(audio, lengths, decode_audio=False)
    wanted = model.targets(examples)
    counts = {"text": 0, "text right": 0, "codes": 0, "codes right": 0, "codes silent": 0}
    for row in range(len(examples)):
        text, codes, n = wanted.text[row], wanted.codes[row], int(wanted.frames[row])
        own_text, own_codes = result["tokens_text"][row, :n], result["tokens_audio"][row, :n]
        is_text = text[:n] != model.text_pad_id
        counts["text"] += int(is_text.sum())
        counts["text right"] += int((own_text == text[:n])[is_text].sum())
        begins, ends = (
            np.flatnonzero(codes[:n, 0] == code)
            for code in (model.speech_bos_id, model.speech_eos_id)
        )
        is_speech = np.zeros(n, bool)
        for begin, end in zip(begins, ends, strict=False):
            is_speech[begin : end + 1] = True
        counts["codes"] += int(is_speech.sum()) * codes.shape[-1]
        counts["codes right"] += int((own_codes == codes[:n])[is_speech].sum())
        counts["codes silent"] += int((codes[:n] == codes[1])[is_speech].sum())
    return {
        "text": counts["text right"] / counts["text"],
        "codes": counts["codes right"] / counts["codes"],
        "silent text": 0.0,
        "silent codes": counts["codes silent"] / counts["codes"],
    }


def overfit(folder: Path, kind: str, overrides: list[str] | None = None) -> dict[str, float]:
    """Trains on the conversations and scores its output without teacher forcing."""
    config = write_config(folder, write_conversations(folder), kind)
    run = experiment.build(config, overrides or [])
    run.fit()
    run.datamodule.setup(frame_count=run.model.frame_count)
    batch = next(iter(run.datamodule.validation_batches()["same"]))
    return free_running_accuracy(run.model, list(batch.references))


def _read(row: dict[str, Any]) -> np.ndarray:
    import soundfile

    wave, rate = soundfile.read(ROOT / "corpus" / row["audio_filepath"], dtype="float32")
    return resample(wave, rate, 16000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="s2s_duplex")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_intermixed_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(overfit(asked.folder, asked.kind, asked.overrides), indent=1))
