"""Whether NeMo loads the SALM that we write for each family of LLMs, and computes the same.

    python -m tools.nemo_families write FOLDER [NAME ...]   # here: small SALMs, and their outputs
    python -m tools.nemo_families check FOLDER [NAME ...]   # where NeMo 3.0.0 is: the table

NAME is one of `MODELS` in tests/parity/tiny_families.py; all by default.
Every family has two models: one with the LLM trained, one with LoRA. `check` loads each with
`SALM.from_pretrained` and compares: the names of all tensors and their values with those of
model.safetensors; the logits of two sequences, one of them padded; and, without LoRA, 8 greedy
tokens after a prompt with audio. It prints one line of Markdown per family.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
OUTPUTS = "outputs.safetensors"
ATOL = 1e-4
NEW_TOKENS = 8
PROMPT = (5, 9, -1, 12, 7)
"""Token ids of the prompt; -1 is the audio."""
LORA = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
LORA_TARGETS = {"phi3": ["qkv_proj", "o_proj"], "phi": ["q_proj", "v_proj", "dense"]}
"""Names of layers where they are not those of Llama."""
VARIANTS = ("plain", "lora")


def inputs(width: int) -> dict[str, np.ndarray]:
    """Embeddings [2, 17, D] with their lengths, and a second of noise."""
    draw = np.random.default_rng(0)
    return {
        "embeds": draw.normal(size=(2, 17, width)).astype(np.float32),
        "audio": draw.normal(size=(1, 16000)).astype(np.float32) / 10,
        "mask": np.arange(17) < np.array([[17], [11]]),
    }


def write(folder: Path, names: Sequence[str]) -> None:
    """Writes one SALM for each family and variant."""
    from tests.parity.tiny_families import MODELS

    for name in names or MODELS:
        for variant in VARIANTS:
            write_one(folder / name / variant, name, variant)
            print(name, variant, flush=True)


def write_one(target: Path, name: str, variant: str) -> None:
    """Writes a SALM with a small random LLM, and what it computes."""
    import jax

    from speechlm2_jax.models import SALM
    from tests.data_pipeline.chat_templates import CHATML, tokenizer_with
    from tests.parity.tiny_families import tiny_model

    llm = target.with_name("llm")
    llm.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_with(CHATML, llm)
    own = {"vocab_size": tokenizer.vocab_size + 8, "eos_token_id": tokenizer.eos_id}
    made = tiny_model(name, **own)
    made.save_pretrained(llm)
    block = json.loads((ROOT / "tests/data/salm/llama_adapter.json").read_text())["cfg_in"]
    block |= {"pretrained_llm": str(llm), "pretrained_asr": str(ROOT / "tests/data/salm/asr.nemo")}
    if variant == "lora":
        names = LORA_TARGETS.get(made.config.model_type, ["q_proj", "v_proj", "o_proj"])
        block["lora"] = LORA | {"target_modules": names}
    model = SALM(block | {"prompt_format": "plain"})
    for number, path in enumerate(sorted(p for p in model.variables if p.endswith("lora_b"))):
        value = model.variables[path]
        model.variables[path] = jax.random.normal(jax.random.key(number), value.shape) / 10
    model.save_pretrained(target)
    found = inputs(made.config.hidden_size)
    found["logits"] = np.asarray(model(found["embeds"], found["mask"])["logits"])
    if variant == "plain":
        tag = model.audio_locator_tag_id
        prompt = found["prompt"] = np.array([[tag if token < 0 else token for token in PROMPT]])
        audio, lengths = found["audio"], np.array([16000])
        ids = model.generate(prompt, audio, lengths, max_new_tokens=NEW_TOKENS)
        found["ids"] = np.asarray(ids)
    save_file(found, target / OUTPUTS)


def check(folder: Path, names: Sequence[str]) -> int:
    """Prints the table; returns the number of models that NeMo does not load alike."""
    import transformers
    from nemo import __version__ as version
    from nemo.collections.speechlm2.models import SALM

    print(f"NeMo {version}, transformers {transformers.__version__}\n")
    print("| family | LLM | LoRA |\n|---|---|---|")
    failures = 0
    for family in names or sorted(path.name for path in folder.iterdir() if path.is_dir()):
        found: list[str] = []
        for variant in VARIANTS:
            try:
                found.append(check_one(SALM, folder / family / variant))
            except Exception as error:  # whatever NeMo or transformers raises is the finding
                traceback.print_exc()
                last = str(error).strip().splitlines()[-1:] or [""]
                found.append(f"no: {type(error).__name__}: {last[0][:120]}")
        failures += sum(not text.startswith("equal") for text in found)
        print(f"| `{family}` | {found[0]} | {found[1]} |", flush=True)
    return failures


def check_one(of: Any, directory: Path) -> str:
    """Loads one directory in NeMo and compares it."""
    import torch

    model = of.from_pretrained(str(directory)).eval()
    llm = model.llm.base_model.model if hasattr(model.llm, "peft_config") else model.llm
    llm.set_attn_implementation("eager")  # the others leave out what some families compute
    state = model.state_dict()
    with safe_open(directory / "model.safetensors", "pt") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        aliases = dict(file.metadata() or {})
    missing = sorted(set(state) - set(written) - set(aliases))
    unknown = sorted(set(written) - set(state))
    if missing or unknown:
        return f"no: missing {missing[:3]}, unknown {unknown[:3]}"
    unequal = [name for name, value in written.items() if not torch.equal(state[name], value)]
    if unequal:
        return f"no: other values of {unequal[:3]}"
    own = load_file(directory / OUTPUTS)
    with torch.no_grad():
        mask = torch.from_numpy(own["mask"])
        logits = model(torch.from_numpy(own["embeds"]), attention_mask=mask)["logits"].numpy()
        ids = own.get("ids")
        if ids is not None:
            ids = model.generate(
                prompts=torch.from_numpy(own["prompt"]),
                audios=torch.from_numpy(own["audio"]),
                audio_lens=torch.tensor([16000]),
                max_new_tokens=NEW_TOKENS,
            ).numpy()
    pairs = zip(np.abs(logits - own["logits"]), own["mask"], strict=True)
    long, short = (float(difference[real].max()) for difference, real in pairs)
    if long > ATOL:
        return f"loads; logits differ by {long:.1e}"
    if ids is not None and not np.array_equal(ids, own["ids"]):
        return "loads; tokens differ"
    if short > ATOL:
        return f"equal ({long:.0e}) but for the shorter sequence ({short:.0e})"
    return f"equal ({max(long, short):.0e})"


def main() -> int:
    """Parses the arguments and runs one half."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("half", choices=("write", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    if arguments.half == "write":
        write(arguments.folder, arguments.names)
        return 0
    return int(check(arguments.folder, arguments.names) > 0)


if __name__ == "__main__":
    sys.exit(main())
