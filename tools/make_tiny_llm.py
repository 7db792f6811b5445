"""Makes configs/parts/tiny_llm: the architecture and tokenizer of a small random LLM, no weights.

    python tools/make_tiny_llm.py

The byte-level BPE is trained on the documentation strings of Python's standard library plus spelt
numbers, so common English and digit words are single tokens and any text can be written.
"""

import ast
import json
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TARGET = Path(__file__).parents[1] / "configs" / "parts" / "tiny_llm"
VOCAB_SIZE = 1024
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen".split()


def documentation() -> list[str]:
    """Collects the docstrings of the standard library's modules, classes and functions."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return texts


def main() -> None:
    """Trains the tokenizer and writes the three files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,  # room for special tokens that a model adds
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    numbers = [" ".join([" " + w for w in NUMBERS] + NUMBERS)] * 500
    tokenizer.train_from_iterator(documentation() + numbers, trainer)
    TARGET.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(TARGET / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    for name, content in (("tokenizer_config.json", tokenizer_config), ("config.json", config)):
        (TARGET / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
