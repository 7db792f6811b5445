"""Makes configs/parts/tiny_encoder.nemo: a small FastConformer, trained on phonemes and with CTC.

    python -m tools.make_tiny_encoder WORK_FOLDER

WORK_FOLDER gets the tokenizer, the speech (tools/corpus/make_pretraining_speech.py, made first if
it is not there) and the training's state; after a stop the same command resumes. The architecture
is that of configs/parts/tiny_encoder.yaml. Neither a test sentence nor a test voice is seen: texts
and voices are those of tools/corpus/texts.py and synthesis.PRETRAINING_VOICES.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import sentencepiece

from speechlm2_jax import settings
from speechlm2_jax.compilation_cache import keep_compiled_programs
from speechlm2_jax.models.ctc import CTCModel
from tools.phonetic_pretraining import Round, pretrain

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "configs" / "parts" / "tiny_encoder.nemo"
CORPUS = ROOT / "tools" / "corpus"
PIECES = 256
ROUNDS = (  # texts, utterances; steps, first and last rate, weights of the two losses
    ("mixed", 16_000, dict(steps=7500, rates=(2e-3, 4e-4), phonetic_weight=1.0, ctc_weight=0.5)),
    # English alone is learned by heart: then phrases in no order, and less help
    ("glued", 16_000, dict(steps=4500, rates=(8e-4, 1e-5), phonetic_weight=0.5, ctc_weight=1.0)),
    # and at last no sentence at all, so that it transcribes known sentences no better than new ones
    ("phrases", 20_000, dict(steps=6000, rates=(6e-4, 1e-5), phonetic_weight=0.5, ctc_weight=1.0)),
)


def make_tokenizer(folder: Path) -> None:
    """Trains the SentencePiece model on the training texts, once."""
    if (folder / "tokenizer.model").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = [CORPUS / "train_sentences.txt", CORPUS / "pretraining_sentences.txt"]
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, texts)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=PIECES,
        model_type="unigram",
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )


def make_speech(folder: Path, texts: str, utterances: int) -> Path:
    """Synthesizes the training texts, unless that was done before. Returns the manifest."""
    if not (folder / "train.jsonl").exists():
        script = CORPUS / "make_pretraining_speech.py"
        options = ["--texts", texts, "--utterances", str(utterances)]
        subprocess.run([sys.executable, str(script), str(folder), *options], check=True)
    return folder / "train.jsonl"


def main(work: Path) -> None:
    """Makes what is missing, trains to the end, and writes the archive."""
    keep_compiled_programs("auto")
    make_tokenizer(work / "tokenizer")
    rounds = [
        Round(manifest=make_speech(work / texts, texts, utterances), **options)
        for texts, utterances, options in ROUNDS
    ]
    config = settings.load(
        ROOT / "configs" / "parts" / "tiny_encoder.yaml",
        [f"model.tokenizer.dir={work / 'tokenizer'}"],
        complete=False,
    )
    model = CTCModel(config["model"])
    model.variables = pretrain(model, rounds, work / "state.npz")
    model.save_to(TARGET, dtype=ml_dtypes.bfloat16)
    print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.make_tiny_encoder WORK_FOLDER")
    main(Path(sys.argv[1]).resolve())
