r"""Checkpoints of real size with random weights: how long they load, and how much memory they take.

    python -m benchmarks.full_size make FOLDER --layout canary-qwen-2.5b   # 5 GB
    python -m benchmarks.full_size run FOLDER --dtype bfloat16
    python evaluate.py pretrained_name=FOLDER inputs=manifest.jsonl

`make` writes NeMo's directory tensor by tensor. `run` opens it in this process, generates once, and
prints seconds and the peak of `RssAnon` (memory that is no file's) while it loads and while it
generates. `read_s` is the time in which the weights file is read into memory.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.presets import PRESETS, Preset
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.casting import DTYPES
from speechlm2_jax.conversion.readers import Index, LazySource, TensorInfo, write_source
from speechlm2_jax.conversion.salm import salm_table
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.layers.module import abstract, describe
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.networks.salm import Salm
from speechlm2_jax.settings import to_plain

TOKENIZER = Path(__file__).parents[1] / "configs/parts/tiny_llm"
SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    mlp_width=1536,
    tied=True,
)
LAYOUTS: dict[str, Preset] = {
    # with a row for each token of the tokenizer
    "micro": replace(PRESETS["micro"], llm=replace(PRESETS["micro"].llm, vocab_size=512)),
    "smollm2-135m": replace(PRESETS["tiny"], llm=SMOLLM2),
    "llama-500m": replace(
        PRESETS["tiny"],
        llm=replace(SMOLLM2, width=1280, layers=20, heads=20, kv_heads=5, mlp_width=3840),
    ),
    "canary-qwen-2.5b": PRESETS["canary-qwen-2.5b"],
}
"""Name -> sizes; LoRA on q_proj and v_proj."""
FAMILY_KEYS = {"head": ("qwen3", "Qwen3ForCausalLM"), "none": ("llama", "LlamaForCausalLM")}
"""Norm of queries and keys -> model_type and class of transformers."""
SAMPLE_S = 0.002
INIT_STD = 0.02
READINGS = 3
"""The fastest of so many counts: memory that the system has not used yet is slow."""


def llm_config(llm: DecoderConfig) -> dict[str, Any]:
    """config.json of the LLM."""
    family, architecture = FAMILY_KEYS[llm.qk_norm]
    return {
        "model_type": family,
        "architectures": [architecture],
        "hidden_act": "silu",
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_width,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "head_dim": llm.head_width,
        "vocab_size": llm.vocab_size,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": llm.tied,
    }


def model_config(preset: Preset) -> dict[str, Any]:
    """NeMo's config.json of the SALM."""
    perception = to_plain(preset.perception)
    blocks = {
        "preprocessor": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "encoder": "nemo.collections.asr.modules.ConformerEncoder",
        "modality_adapter": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
    }
    named = {key: {"_target_": target, **perception[key]} for key, target in blocks.items()}
    return {
        "model_type": "nemo_speechlm",
        "pretrained_llm": "random",
        "prompt_format": "qwen",
        "lora": {
            "task_type": "CAUSAL_LM",
            "r": preset.lora_rank,
            "lora_alpha": 2 * preset.lora_rank,
            "target_modules": ["q_proj", "v_proj"],
        },
        "perception": {**perception, **named},
    }


def random_weights(preset: Preset, dtype: str) -> LazySource:
    """Every tensor of the checkpoint by NeMo's name, drawn when it is read."""
    config = preset.network()
    infos = describe(abstract(lambda rngs: Salm(config, rngs=rngs)))
    shapes = {path: jax.ShapeDtypeStruct(info.shape, info.dtype) for path, info in infos.items()}
    named = mapping.export_source(shapes, salm_table(config)).infos
    made = DTYPES[dtype]
    stored = {
        name: TensorInfo(info.shape, made if info.dtype.kind == "f" else info.dtype)
        for name, info in named.items()
    }

    def draw(name: str, index: Index | None) -> np.ndarray:
        info = stored[name]
        if info.dtype.kind in "iu":
            return np.zeros(info.shape, info.dtype)
        rng = np.random.default_rng(list(name.encode()))
        values = rng.standard_normal(info.shape, np.float32) * INIT_STD
        if ".featurizer." in name:  # filterbank and window
            return np.abs(values).astype(info.dtype)
        is_scale = name.endswith((".weight", "running_var")) and len(info.shape) == 1
        return (values + (1.0 if is_scale else 0.0)).astype(info.dtype)

    return LazySource(stored, draw)


def make(folder: Path, preset: Preset, dtype: str) -> None:
    """Writes a directory that `SALM.from_pretrained` opens."""
    (folder / "llm_backbone").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model_config(preset), indent=2))
    (folder / "llm_backbone/config.json").write_text(json.dumps(llm_config(preset.llm), indent=2))
    Tokenizer(TOKENIZER).save(folder)
    aliases = mapping.aliases(salm_table(preset.network()))
    write_source(folder / "model.safetensors", random_weights(preset, dtype), aliases)


class AnonymousMemory:
    """Samples the memory of this process that is no file's."""

    def __init__(self) -> None:
        self.start_bytes = anonymous_bytes()
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        """Keeps the peak while the block runs, less what the process had at the beginning."""
        peak, is_done = 0, threading.Event()

        def sample() -> None:
            nonlocal peak
            while not is_done.wait(SAMPLE_S):
                peak = max(peak, anonymous_bytes())

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            is_done.set()
            sampler.join()
            self.peak_bytes[phase] = max(peak, anonymous_bytes()) - self.start_bytes


def anonymous_bytes() -> int:
    """RssAnon of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def reading_s(file: Path) -> float:
    """Seconds in which a file is read into memory once."""
    start = time.perf_counter()
    content = file.read_bytes()
    seconds = time.perf_counter() - start
    del content
    return seconds


def run(folder: Path, dtype: str, new_tokens: int) -> dict[str, Any]:
    """Loads and generates once from a second of noise."""
    with tempfile.TemporaryDirectory() as small:  # imports packages, and starts the compiler
        make(Path(small) / "model", LAYOUTS["micro"], "float32")
        generate(open_model(Path(small) / "model", dtype), 2)
    file = folder / "model.safetensors"
    reading_s(file)  # so that every reading finds the file in memory
    read = [reading_s(file) for _ in range(READINGS)]
    memory = AnonymousMemory()
    load, model = [], None
    for _ in range(READINGS):
        del model  # else two models are in memory
        with memory.watch("load"):
            seconds, model = timing.timed(lambda: open_model(folder, dtype))
        load.append(seconds)
    with memory.watch("generate"):
        first_s, ids = timing.timed(lambda: generate(model, new_tokens))
    with memory.watch("generate again"):
        again_s, same = timing.timed(lambda: generate(model, new_tokens))
    assert np.array_equal(ids, same)
    size = file.stat().st_size
    return {
        "file_gb": size / 1e9,
        "read_s": min(read),
        "load_s": min(load),
        "load_over_read": min(load) / min(read),
        "first_s": first_s,
        "again_s": again_s,
        "before_gb": memory.start_bytes / 1e9,
        **{f"{phase}_gb": peak / 1e9 for phase, peak in memory.peak_bytes.items()},
        "peak_over_file": max(memory.peak_bytes.values()) / size,
        "ids": ids[0, :8].tolist(),
    }


def open_model(folder: Path, dtype: str) -> Any:
    """The SALM in a directory."""
    from speechlm2_jax.models import SALM

    return SALM.from_pretrained(folder, dtype=dtype)


def generate(model: Any, new_tokens: int) -> np.ndarray:
    """Token ids [1, T] for a second of noise."""
    audio = np.random.default_rng(0).normal(scale=0.1, size=(1, model.sampling_rate))
    prompt = [[{"role": "user", "content": f"Repeat: {model.audio_locator_tag}"}]]
    lengths = np.array([audio.shape[1]])
    return model.generate(prompt, audio.astype(np.float32), lengths, max_new_tokens=new_tokens)


def main() -> None:
    """Makes or measures."""
    parser = timing.parser(__doc__)
    commands = parser.add_subparsers(required=True)
    add: Callable[[str], argparse.ArgumentParser] = commands.add_parser
    maker, runner = add("make"), add("run")
    for each in (maker, runner):
        each.add_argument("folder", type=Path)
    maker.add_argument("--layout", choices=LAYOUTS, default="canary-qwen-2.5b")
    maker.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the file")
    maker.set_defaults(run=False)
    runner.add_argument("--dtype", default="float32", help="of the computation")
    runner.add_argument("--new", type=int, default=16, help="tokens to generate")
    runner.set_defaults(run=True)
    arguments = parser.parse_args()
    if not arguments.run:
        make(arguments.folder, LAYOUTS[arguments.layout], arguments.dtype)
        return
    result = run(arguments.folder, arguments.dtype, arguments.new)
    timing.report([{k: v for k, v in result.items() if k != "ids"}], result | timing.machine())


if __name__ == "__main__":
    main()
