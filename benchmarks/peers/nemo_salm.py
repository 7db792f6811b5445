"""Times NeMo's own SALM on the work of `benchmarks.salm`: the same shapes, mel features and keys.

    python benchmarks/peers/nemo_salm.py --preset small --batch 4 --seconds 8

Runs in an environment with nemo_toolkit 3.0.0 (torch), without this package. Weights are random;
features are given, as in benchmarks/salm.py, so no mel is computed. A step is `training_step`,
backward, clipping at 1.0 and AdamW; Lightning's own bookkeeping is left out.
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
import tempfile
from typing import Any

import torch
from measuring import measure

FRAMES_PER_S, HOP = 100, 160
TAG = "<|audioplaceholder|>"
SPECIALS = ("<unk>", "<s>", "</s>")
PRESETS = {
    "tiny": {
        "mel": 80,
        "encoder": {"d_model": 128, "n_layers": 4, "n_heads": 4},
        "llm": {
            "architecture": "qwen3",
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 768,
            "vocab_size": 4000,
            "tie_word_embeddings": True,
        },
        "rank": 8,
    },
    "small": {
        "mel": 80,
        "encoder": {"d_model": 256, "n_layers": 12, "n_heads": 4},
        "llm": {
            "architecture": "llama",
            "hidden_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 1408,
            "vocab_size": 16000,
        },
        "rank": 16,
    },
}
ENCODER = {
    "_target_": "nemo.collections.asr.modules.ConformerEncoder",
    "feat_out": -1,
    "subsampling": "dw_striding",
    "subsampling_factor": 8,
    "subsampling_conv_channels": 256,
    "ff_expansion_factor": 4,
    "self_attention_model": "rel_pos",
    "conv_kernel_size": 9,
    "conv_norm_type": "batch_norm",
    "dropout": 0.0,
    "dropout_pre_encoder": 0.0,
    "dropout_emb": 0.0,
    "dropout_att": 0.0,
}


class Given(torch.nn.Module):
    """In the place of the mel: features that are there already, [B, M, T]."""

    def __init__(self, mel: torch.Tensor, featurizer: torch.nn.Module):
        super().__init__()
        self.mel, self.featurizer = mel, featurizer

    def forward(self, input_signal, length):
        """Features and their lengths, in mel frames."""
        rows = len(input_signal)
        return self.mel[:rows], torch.full((rows,), self.mel.shape[-1])


def main() -> None:
    """Runs what is asked for and prints one line of JSON."""
    arguments = _arguments()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    preset = PRESETS[arguments.preset]
    model = build(preset)
    batch = make_batch(model, preset, arguments)
    counted = [p for name, p in model.named_parameters() if "preprocessor" not in name]
    result: dict[str, Any] = {
        **vars(arguments),
        "parameters_m": round(sum(p.numel() for p in counted) / 1e6, 2),
        "trainable_m": round(sum(p.numel() for p in counted if p.requires_grad) / 1e6, 2),
        "torch": torch.__version__,
        "threads": threads,
    }
    if arguments.only != "answer":
        model.train()
        step = training(model, batch)
        result["first_loss"] = step()
        result |= measure("train_step", "train", step, arguments.repeats)
    if arguments.only != "train":
        model.eval()
        run = generation(model, batch, arguments.prompt, arguments.answer)
        result |= measure("generate", "generate", run, max(3, arguments.repeats // 2))
    print(json.dumps(result), flush=True)


def build(preset: dict[str, Any]):
    """NeMo's SALM with random weights; encoder, projection and LoRA are trained."""
    import peft.import_utils
    import peft.tuners.lora.torchao

    # peft refuses the torchao that nemo_toolkit brings; nothing here is quantized
    peft.import_utils.is_torchao_available = lambda: False
    peft.tuners.lora.torchao.is_torchao_available = lambda: False
    from nemo.collections.speechlm2.models import SALM

    with tempfile.TemporaryDirectory() as folder:
        write_llm(Path(folder), preset["llm"])
        model = SALM(config(folder, preset))
    model.configure_optimizers = None
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("perception.") or ".lora_" in name
    model.log = model.log_dict = lambda *args, **kwargs: None
    return model


def config(folder: str, preset: dict[str, Any]) -> dict[str, Any]:
    """NeMo's `model:` block, without dropout."""
    width = preset["encoder"]["d_model"]
    return {
        "pretrained_llm": folder,
        "pretrained_asr": None,
        "pretrained_weights": False,
        "audio_locator_tag": TAG,
        "prompt_format": "llama2",
        "freeze_params": [],
        "prevent_freeze_params": [],
        "lora": {
            "task_type": "CAUSAL_LM",
            "r": preset["rank"],
            "lora_alpha": 2 * preset["rank"],
            "lora_dropout": 0.0,
            "target_modules": ["q_proj", "v_proj"],
        },
        "perception": {
            "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
            "preprocessor": {
                "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                "sample_rate": 16000,
                "features": preset["mel"],
                "window_size": 0.025,
                "window_stride": 0.01,
                "pad_to": 0,
                "dither": 0.0,
            },
            "encoder": {**ENCODER, "feat_in": preset["mel"], **preset["encoder"]},
            "modality_adapter": {
                "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
                "d_model": width,
            },
            "output_dim": preset["llm"]["hidden_size"],
        },
    }


def write_llm(folder: Path, sizes: dict[str, Any]) -> None:
    """The LLM's config, and a tokenizer of one word per token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

    sizes = dict(sizes)
    family = {"llama": LlamaConfig, "qwen3": Qwen3Config}[sizes.pop("architecture")]
    family(**sizes).save_pretrained(folder)
    words = [*SPECIALS, *(f"w{n}" for n in range(sizes["vocab_size"] - len(SPECIALS)))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(folder)


def make_batch(model, preset: dict[str, Any], sizes: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Sequences of prompt, one clip and a response, every response token a target."""
    frames = int(sizes.seconds * FRAMES_PER_S)
    samples = frames * HOP
    mel = torch.randn(sizes.batch, preset["mel"], frames)
    given = Given(mel, model.perception.preprocessor.featurizer)
    model.perception.preprocessor = given
    count = preset["llm"]["vocab_size"]
    text = torch.randint(10, count, (sizes.batch, sizes.prompt + 1 + sizes.answer))
    text[:, sizes.prompt] = model.audio_locator_tag_id
    is_response = torch.zeros_like(text, dtype=torch.bool)
    is_response[:, sizes.prompt + 1 :] = True
    return {
        "audios": torch.zeros(sizes.batch, samples),
        "audio_lens": torch.full((sizes.batch,), samples),
        "input_ids": text,
        "loss_mask": is_response,
    }


def training(model, batch):
    """A call that takes one step and gives the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)

    def step() -> float:
        loss = model.training_step(batch, 0)["loss"]
        model.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def generation(model, batch, prompt: int, new_tokens: int):
    """A call that generates exactly `new_tokens` tokens per prompt, greedily."""
    return lambda: model.generate(
        prompts=batch["input_ids"][:, : prompt + 1],
        audios=batch["audios"],
        audio_lens=batch["audio_lens"],
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny")
    add("--batch", type=int, default=4)
    add("--seconds", type=float, default=4.0)
    add("--prompt", type=int, default=16)
    add("--answer", type=int, default=32)
    add("--repeats", type=int, default=5)
    add("--only", choices=("train", "answer"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
