"""A PyTorch SALM of stock Hugging Face components, timed on the work of `benchmarks.salm`.

    python benchmarks/peers/torch_peer.py --preset tiny
    python benchmarks/peers/torch_peer.py --preset canary-qwen-2.5b --batch 32 --seconds 15

A Parakeet encoder (FastConformer), a projection and a causal LLM with LoRA on query and value;
random weights, random mel features. A training step is forward, backward, clipping at 1.0 and
AdamW; encoder, projection and LoRA are trained. Generation is greedy, `--new-tokens` for each row.
Weights and optimizer state have `--dtype`. The head scores the positions of targets only.
`--compile` compiles each layer (torch's regional compilation) and generates with a static cache.

`--serve` runs commands instead, one a line (train, train-compiled, generate, generate-compiled),
so that two programs can take turns: benchmarks/device/turns.py. Needs torch and transformers >= 5.
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
import time

import torch
import torch.nn.functional as F
from measuring import measure
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    Qwen3Config,
)

FRAMES_PER_S = 100
PRESETS = {
    "micro": {
        "encoder": (8, 16, 1, 2),
        "llm": (Qwen3Config, 64, 16, 1, 4, 2, 8, 32),
        "rank": 2,
    },
    "tiny": {
        "encoder": (80, 128, 4, 4),
        "llm": (Qwen3Config, 4000, 256, 4, 4, 2, 64, 768),
        "rank": 8,
    },
    "small": {
        "encoder": (80, 256, 12, 4),
        "llm": (LlamaConfig, 16000, 512, 8, 8, 4, 64, 1408),
        "rank": 16,
    },
    "large": {
        "encoder": (80, 512, 17, 8),
        "llm": (LlamaConfig, 32000, 768, 12, 12, 4, 64, 2048),
        "rank": 16,
    },
    "canary-qwen-2.5b": {
        "encoder": (128, 1024, 32, 8),
        "llm": (Qwen3Config, 151936, 2048, 28, 16, 8, 128, 6144),
        "rank": 128,
    },
}
"""`encoder`: mel bins, width, layers, heads. `llm`: family, vocabulary, width, layers, query heads,
key/value heads, head width, MLP width."""


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained update of low rank, scaled by 2 as alpha = 2 r."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        """[..., in] to [..., out]."""
        return self.base(x) + 2.0 * self.up(self.down(x))


class PeerSalm(nn.Module):
    """Encoder, projection and LLM."""

    def __init__(self, preset, dtype):
        super().__init__()
        llm = llm_config(*preset["llm"])
        self.encoder = ParakeetEncoder(encoder_config(*preset["encoder"])).to(dtype)
        self.projection = nn.Linear(preset["encoder"][1], llm.hidden_size, dtype=dtype)
        self.llm = AutoModelForCausalLM.from_config(
            llm, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
        self.llm.requires_grad_(False)
        for layer in self.llm.model.layers:
            attention = layer.self_attn
            attention.q_proj = LoraLinear(attention.q_proj, preset["rank"])
            attention.v_proj = LoraLinear(attention.v_proj, preset["rank"])

    def embed(self, mel, *token_ids):
        """Embeddings of the first ids, the audio, then of the other ids: [B, T, D]."""
        table = self.llm.get_input_embeddings()
        frames = self.projection(self.encoder(mel).last_hidden_state)
        prompt, *rest = (table(ids) for ids in token_ids)
        return torch.cat([prompt, frames, *rest], dim=1)

    def loss(self, mel, prompt, response):
        """Mean cross entropy of the response's tokens."""
        embeds, count = self.embed(mel, prompt, response), response.shape[1]
        output = self.llm(inputs_embeds=embeds, logits_to_keep=count + 1, use_cache=False)
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), response.flatten())


def encoder_config(mel_bins, width, layers, heads):
    """A FastConformer without dropout."""
    return ParakeetEncoderConfig(
        num_mel_bins=mel_bins,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        conv_kernel_size=9,
        subsampling_factor=8,
        subsampling_conv_channels=256,
        dropout=0.0,
        dropout_positions=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
    )


def llm_config(family, vocabulary, width, layers, heads, kv_heads, head_width, mlp_width):
    """A Hugging Face config; Qwen3 ties its head to its embeddings."""
    return family(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_width,
        intermediate_size=mlp_width,
        tie_word_embeddings=family is Qwen3Config,
    )


class Work:
    """A model with random weights on one device, and what is timed on it."""

    def __init__(self, arguments):
        self.arguments, self.device = arguments, torch.device(arguments.device)
        self.dtype, preset = getattr(torch, arguments.dtype), PRESETS[arguments.preset]
        self._compiled = {}
        with self.device:
            self.model = PeerSalm(preset, self.dtype)
        rows, vocabulary = arguments.batch, preset["llm"][1]
        frames = int(arguments.seconds * FRAMES_PER_S)
        on_device = {"device": self.device}
        self.mel = torch.randn(rows, frames, preset["encoder"][0], dtype=self.dtype, **on_device)
        ids = torch.randint(
            10, vocabulary, (rows, arguments.prompt + arguments.answer), **on_device
        )
        self.prompt, self.response = ids[:, : arguments.prompt], ids[:, arguments.prompt :]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, foreach=True)

    def use_compiled_layers(self, wanted):
        """Compiles the layers, each kind once: minutes less than the whole, and nearly as fast."""
        for layer in (*self.model.encoder.layers, *self.model.llm.model.layers):
            if layer not in self._compiled:
                compiled = torch.compile(
                    layer.forward, backend=self.arguments.backend, dynamic=False
                )
                self._compiled[layer] = compiled, layer.forward
            layer.forward = self._compiled[layer][0 if wanted else 1]

    def train(self):
        """Takes one optimizer step and waits for it; gives the loss."""
        self.model.train()
        loss = self.model.loss(self.mel, self.prompt, self.response)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    @torch.no_grad()
    def generate(self, static_cache=False):
        """Decodes `--new-tokens` of every row; with a static cache the decoding is compiled."""
        self.model.eval()
        embeds, count = self.model.embed(self.mel, self.prompt), self.arguments.new_tokens
        ids = self.model.llm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static" if static_cache else None,
        )
        return ids.cpu()

    def peak_memory_gib(self):
        """The most that tensors have taken on a GPU; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() / 2**30


def serve(work):
    """Runs each command and prints a line of JSON: the seconds of its calls, or the error.

    The first call of a command, which compiles, is given by itself.
    """
    calls = {"train": work.train, "generate": work.generate}
    seen = set()
    for line in sys.stdin:
        name, *repeats = line.split()
        kind, _, compiled = name.partition("-")
        try:
            work.use_compiled_layers(name == "train-compiled")
            call = calls[kind]
            if compiled and kind == "generate":
                call = lambda: work.generate(static_cache=True)  # noqa: E731
            reply = {} if name in seen else {"first_call_s": seconds(call)}
            seen.add(name)
            reply["times_s"] = [seconds(call) for _ in range(int(repeats[0]))]
            reply["peak_memory_gib"] = work.peak_memory_gib()
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


def seconds(call):
    """Of one call, which waits for its result."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def counts(work):
    """Parameters, and what they run on."""
    every = sum(p.numel() for p in work.model.parameters())
    return {
        "parameters_m": round(every / 1e6, 2),
        "trainable_m": round(sum(p.numel() for p in work.trained) / 1e6, 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main():
    """Times what is asked for and prints one line of JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.memory_fraction and arguments.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(arguments.memory_fraction)
    work = Work(arguments)
    if arguments.serve:
        print(json.dumps(counts(work)), flush=True)
        serve(work)
        return
    work.use_compiled_layers(arguments.compile)
    result = {**vars(arguments), **counts(work), "first_loss": work.train()}
    result |= measure("train_step", "train", work.train, arguments.repeats)
    work.use_compiled_layers(False)  # generation compiles what it decodes with by itself
    generate = lambda: work.generate(static_cache=arguments.compile)  # noqa: E731
    result |= measure("generate", "generate", generate, max(3, arguments.repeats // 2))
    print(json.dumps({**result, "peak_memory_gib": work.peak_memory_gib()}), flush=True)


def _arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--preset", choices=PRESETS, default="tiny")
    add("--device", default="cuda" if gpu else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    add("--batch", type=int, default=4)
    add("--seconds", type=float, default=4.0, help="audio per row")
    add("--prompt", type=int, default=16, help="prompt tokens")
    add("--answer", type=int, default=32, help="target tokens of a training sequence")
    add("--new-tokens", type=int, help="generated per prompt; as many as --answer by default")
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--compile", action="store_true")
    add("--backend", default="inductor", help="of torch.compile")
    add("--memory-fraction", type=float, help="of the GPU, that tensors may take")
    add("--serve", action="store_true")
    arguments = parser.parse_args()
    arguments.new_tokens = arguments.new_tokens or arguments.answer
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    return arguments


if __name__ == "__main__":
    main()
