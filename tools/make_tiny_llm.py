"""Makes configs/parts/tiny_llm: a small Llama with its tokenizer, trained on text.

    python -m tools.make_tiny_llm WORK_FOLDER [key=value ...]

The byte-level BPE is trained on the corpus's training texts (no test sentence is read) and on
documentation strings of Python's standard library, so common words are single tokens and any text
can be written. The LLM learns to follow short instructions: repeat, tidy up what was stuttered,
mistyped or cut into pieces, spell, go on. It reads phrases of one to three words in no order, never
a whole sentence: what it could say by heart, a SALM on top of it would not listen to. WORK_FOLDER
gets the dialogs and the run; stopped, the same command goes on. Keys are those of
configs/parts/tiny_llm.yaml.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from speechlm2_jax import experiment
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.readers import write_safetensors
from speechlm2_jax.models import SALM
from tools.corpus.texts import glued_text

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "configs" / "parts" / "tiny_llm"
CORPUS = ROOT / "tools" / "corpus"
VOCAB_SIZE = 1024
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""NeMo's prompt format qwen, which learns the whole turn of the assistant."""
DIGITS = "zero one two three four five six seven eight nine".split()
DIALOGS, VALIDATION_DIALOGS = 250_000, 256
TRAIN_SEED, VALIDATION_SEED = 2, 1
"""With seed 0, five words of a test sentence came up by chance in one dialog; with 2, in none."""
FILLERS = ("-", "-", "-", "uh", "um", "...")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def documentation() -> list[str]:
    """Collects the docstrings of the standard library's modules, classes and functions."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return texts


def training_texts() -> list[str]:
    """Reads the corpus's training sentences and the word sequences made of them."""
    names = ("train_sentences.txt", "pretraining_sentences.txt")
    return [line for name in names for line in (CORPUS / name).read_text().splitlines() if line]


def make_architecture(texts: Sequence[str]) -> None:
    """Trains the tokenizer and writes all of the LLM but its weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,  # room for special tokens that a model adds
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    digits = [" ".join([" " + w for w in DIGITS] + DIGITS)] * 200
    spoken = [text for text in texts for _ in range(20)]
    tokenizer.train_from_iterator([*documentation(), *spoken, *digits], trainer)
    TARGET.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(TARGET / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",  # where an agent of a duplex model begins to speak
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
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
        "dtype": "bfloat16",
    }
    for name, content in (("tokenizer_config.json", tokenizer_config), ("config.json", config)):
        (TARGET / name).write_text(json.dumps(content, indent=2) + "\n")


# Instructions ---------------------------------------------------------------------------------


def stuttered(text: str, rng: random.Random) -> str:
    """Says words again, in letters or in parts, with fillers between them."""
    words: list[str] = []
    filled = rng.uniform(0.0, 0.6)
    for word in text.split():
        while rng.random() < filled:
            words.append(rng.choice(FILLERS))
        draw = rng.random()
        if draw < 0.15:
            words += list(word)
        elif draw < 0.35 and len(word) > 3:
            cut = rng.randrange(1, len(word))
            words += [word[:cut], word[cut:]]
        else:
            words += [word] * rng.choice((1, 1, 1, 2, 2, 3))
    return " ".join(words)


def in_pieces(text: str, rng: random.Random) -> str:
    """Cuts words into pieces among pauses, as a recogniser hears them: "the - - kit - -chen".

    A dash is a pause; what follows it without a space goes on with the word before.
    """
    paused, cut = rng.uniform(0.0, 0.7), rng.uniform(0.0, 0.5)
    mistyped = rng.choice((0.0, 0.0, 0.1, 0.2))
    heard: list[str] = []

    def pause() -> None:
        while rng.random() < paused:
            heard.append(" -")

    for word in text.split():
        pause()
        word = mistype(word, rng) if rng.random() < mistyped else word
        heard.append(" " + word[0])
        for letter in word[1:]:
            if rng.random() < cut:
                heard.append(" -")
                pause()
            heard.append(letter)
    return "".join(heard).strip()


def mistype(word: str, rng: random.Random) -> str:
    """Leaves a letter out, writes one twice, or writes another."""
    place = rng.randrange(len(word))
    letter = rng.choice(("", word[place] * 2, rng.choice(LETTERS)))
    return word[:place] + letter + word[place + 1 :] or word


def repeat(text: str, rng: random.Random) -> tuple[str, str]:
    """Repeats a sentence."""
    return f"{rng.choice(('Repeat:', 'Transcribe:', 'Write down:'))} {text}", text


def tidy(text: str, rng: random.Random) -> tuple[str, str]:
    """Writes as it was meant what was stuttered or cut into pieces."""
    untidy = rng.choice((stuttered, in_pieces, in_pieces))(text, rng)
    return f"{rng.choice(('Tidy up:', 'Transcribe:', 'Write down:'))} {untidy}", text


def spell(text: str, rng: random.Random) -> tuple[str, str]:
    """Spells a word."""
    word = rng.choice(text.split())
    return f"Spell: {word}", " ".join(word)


def go_on(text: str, rng: random.Random) -> tuple[str, str]:
    """Finishes a sentence."""
    words = text.split()
    cut = rng.randrange(1, max(len(words), 2))
    return f"Go on: {' '.join(words[:cut])}", " ".join(words[cut:]) or text


def say(text: str, rng: random.Random) -> tuple[str, str]:
    """Says anything."""
    return rng.choice(("Say something.", "Tell me a sentence.")), text


TASKS: tuple[tuple[Callable[[str, random.Random], tuple[str, str]], float], ...] = (
    (repeat, 0.2),
    (tidy, 0.66),
    (spell, 0.06),
    (go_on, 0.04),
    (say, 0.04),
)


def dialogs(texts: list[str], count: int, seed: int) -> Iterator[dict]:
    """Makes dialogs as a NeMo manifest of conversations has them."""
    rng = random.Random(seed)
    tasks, weights = zip(*TASKS, strict=True)
    words = sorted({word for text in texts for word in text.split()})
    for i in range(count):
        asked, answer = rng.choices(tasks, weights)[0](_choose(texts, words, rng), rng)
        turns = (("User", asked), ("Assistant", answer))
        yield {
            "id": f"dialog_{i}",
            "conversations": [{"from": w, "type": "text", "value": v} for w, v in turns],
        }


def _choose(sentences: list[str], words: Sequence[str], rng: random.Random) -> str:
    """Phrases in no order, words in no order, or a string of digits."""
    draw = rng.random()
    if draw < 0.1:
        return " ".join(rng.choices(DIGITS, k=rng.randint(1, 8)))
    if draw < 0.4:
        return " ".join(rng.choices(words, k=rng.randint(2, 11)))
    return glued_text(sentences, np.random.default_rng(rng.getrandbits(32)))


def write_dialogs(folder: Path, texts: list[str]) -> None:
    """Writes the training and validation manifests."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = (("train", DIALOGS, TRAIN_SEED), ("val", VALIDATION_DIALOGS, VALIDATION_SEED))
    for name, count, seed in parts:
        lines = [json.dumps(dialog) + "\n" for dialog in dialogs(texts, count, seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


# Training -------------------------------------------------------------------------------------


def export(run: Path) -> None:
    """Writes the LLM of a run as a Hugging Face directory."""
    model = SALM.from_pretrained(run)
    config = decoder_config(json.loads((TARGET / "config.json").read_text()))
    llm = {
        path.removeprefix("llm."): np.asarray(value)
        for path, value in model.variables.items()
        if path.startswith("llm.")
    }
    tensors = mapping.export(llm, decoder_table(config))
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    write_safetensors(TARGET / "model.safetensors", half)
    print(f"{TARGET}: {sum(value.size for value in half.values()):,} parameters")


def main(work: Path, overrides: list[str]) -> None:
    """Makes what is missing, trains to the end, and writes the weights."""
    data, run = work / "dialogs", work / "run"
    if not (data / "val.jsonl").exists():
        texts = training_texts()
        make_architecture(texts)
        write_dialogs(data, texts)
    settings = [
        f"data.train_ds.input_cfg.0.manifest_filepath={data / 'train.jsonl'}",
        f"data.validation_ds.datasets.val.input_cfg.0.manifest_filepath={data / 'val.jsonl'}",
        f"exp_manager.explicit_log_dir={run}",
        *overrides,
    ]
    result = experiment.build(ROOT / "configs" / "parts" / "tiny_llm.yaml", settings).fit()
    if result.is_finished:
        export(run)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tools.make_tiny_llm WORK_FOLDER [key=value ...]")
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
