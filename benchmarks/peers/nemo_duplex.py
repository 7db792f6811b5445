"""Times NeMo's own DuplexS2SModel on the parts that `benchmarks.duplex_parts` wrote.

    python benchmarks/peers/nemo_duplex.py FOLDER --batch 2 --seconds 8

Runs in an environment with nemo_toolkit 3.0.0 (torch), without this package; same shapes, same
weights, same batches and the same keys as benchmarks/duplex.py, whose parts it reads. A step is
forward, backward, clipping at 1.0 and AdamW; Lightning's own bookkeeping is left out.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import measure

FRAME_S, USER_HZ, AGENT_HZ = 0.08, 16000, 22050


def main() -> None:
    """Runs what is asked for and prints one line of JSON."""
    arguments = _arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = load(arguments.folder, getattr(torch, arguments.dtype))
    every = list(model.parameters())
    result = {
        "dtype": arguments.dtype,
        "parameters_m": round(sum(p.numel() for p in every) / 1e6, 3),
        "trainable_m": round(sum(p.numel() for p in every if p.requires_grad) / 1e6, 3),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    batch = make_batch(model, arguments.batch, round(arguments.seconds / FRAME_S))
    if arguments.only != "talk":
        step = training(model, batch)
        result["first_loss"] = step()
        result |= measure("train_step", "train", step, arguments.repeats)
    if arguments.only != "train":
        kinds = {"infer": (arguments.batch, True), "infer1": (1, True), "frame": (1, False)}
        if arguments.batch == 1:
            del kinds["infer"]
        model.eval()
        for name, (rows, decode_audio) in kinds.items():
            run = conversations(model, batch, rows, decode_audio)
            result |= measure(name, name, run, max(3, arguments.repeats // 2))
        result["frame_ms"] = 1e3 * result["frame_s"][0] / round(arguments.seconds / FRAME_S)
    print(json.dumps(result), flush=True)


def load(folder: Path, dtype: torch.dtype) -> Any:
    """NeMo's model of these parts, with the weights beside them if there are any."""
    from nemo.collections.speechlm2.models import DuplexS2SModel
    from safetensors.torch import load_file

    cfg = json.loads((folder / "model.json").read_text())
    for name in ("pretrained_llm", "pretrained_audio_codec"):
        cfg[name] = str(folder.resolve() / cfg[name])
    model = DuplexS2SModel(cfg)
    weights = folder / "model" / "model.safetensors"
    if weights.exists():
        missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
        missing = [name for name in missing if "loss_fn" not in name and "fb" not in name]
        if missing or unexpected:
            sys.exit(f"weights do not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith("audio_codec.")
    model.log_dict = lambda *args, **kwargs: None
    if dtype != torch.float32:
        for name in ("llm", "lm_head", "embed_tokens", "embed_audio_tokens", "audio_head"):
            getattr(model, name).to(dtype)
        model.perception.to(dtype)
    return model


def make_batch(model: Any, rows: int, frames: int) -> dict[str, torch.Tensor]:
    """The numbers of `benchmarks.duplex_work.Conversations`."""
    random = np.random.default_rng(0)
    vocab_size = model.llm.config.vocab_size
    users, agents, channels = [], [], []
    for _ in range(rows):
        for found, rate in ((users, USER_HZ), (agents, AGENT_HZ)):
            samples = round(frames * FRAME_S * rate)
            found.append(random.uniform(-0.3, 0.3, samples).astype(np.float32))
        tokens = np.full(frames, model.text_pad_id, np.int64)
        start, end = frames // 4, 3 * frames // 4
        text = random.integers(3, vocab_size, frames)
        tokens[start:end:2] = text[start:end:2]
        tokens[start], tokens[end] = model.text_bos_id, model.text_eos_id
        channels.append(tokens)
    batch = {
        "source_audio": torch.tensor(np.stack(users)),
        "target_audio": torch.tensor(np.stack(agents)),
        "target_tokens": torch.tensor(np.stack(channels)),
    }
    for name in ("source_audio", "target_audio"):
        batch[f"{name}_lens"] = torch.full((rows,), batch[name].shape[1], dtype=torch.long)
    return batch


def training(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], float]:
    """A call that takes one step and gives the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.98), weight_decay=0, foreach=True)

    def step() -> float:
        optimizer.zero_grad()
        copied = {name: value.clone() for name, value in batch.items()}
        loss = model.training_step(copied, 0)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss)

    return step


def conversations(
    model: Any, batch: dict[str, torch.Tensor], rows: int, decode_audio: bool
) -> Callable[[], Any]:
    """A call that runs offline inference on so many of the conversations."""
    audio, lengths = batch["source_audio"][:rows], batch["source_audio_lens"][:rows]
    return lambda: model.offline_inference(audio.clone(), lengths.clone(), decode_audio)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", choices=("train", "talk"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
