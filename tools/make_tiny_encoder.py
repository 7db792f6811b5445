"""Makes the bundled encoders: configs/parts/tiny_encoder.nemo, and _causal.nemo, which can stream.

    python -m tools.make_tiny_encoder WORK_FOLDER [--first FIRST.nemo]

Small FastConformers, trained on speech of synthesizers. In turn:

1. the encoder with full context, on phonemes and with CTC, on espeak-ng's speech; --first
   configs/parts/tiny_encoder.nemo takes the one that is there;
2. the causal encoder starts from its weights (tools/causal_start.py) and is trained with CTC on
   espeak-ng's speech, on voices that sound like people, and on the bundled corpus.

WORK_FOLDER gets the tokenizer, the speech (tools/corpus/make_pretraining_speech.py and
make_natural_speech.py, made first if it is not there) and the trainings' states; after a stop the
same command resumes. The architectures are those of configs/parts/tiny_encoder.yaml and
tiny_encoder_causal.yaml. Neither a test sentence, nor a test voice, nor a person is among it.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import sentencepiece

from speechlm2_jax import settings
from speechlm2_jax.compilation_cache import keep_compiled_programs
from speechlm2_jax.models.ctc import CTCModel
from tools.causal_start import causal_start
from tools.phonetic_pretraining import Round, pretrain

ROOT = Path(__file__).parents[1]
PARTS = ROOT / "configs" / "parts"
TARGET, CAUSAL_TARGET = PARTS / "tiny_encoder.nemo", PARTS / "tiny_encoder_causal.nemo"
CORPUS = ROOT / "tools" / "corpus"
PIECES = 256
ROUNDS: tuple[
    tuple[str, int, dict[str, Any]], ...
] = (  # texts, utterances; steps, first and last rate, weights of the two losses
    ("mixed", 16_000, dict(steps=7500, rates=(2e-3, 4e-4), phonetic_weight=1.0, ctc_weight=0.5)),
    # English alone is learned by heart: then phrases in no order, and less help
    ("glued", 16_000, dict(steps=4500, rates=(8e-4, 1e-5), phonetic_weight=0.5, ctc_weight=1.0)),
    # and at last no sentence at all, so that it transcribes known sentences no better than new ones
    ("phrases", 20_000, dict(steps=6000, rates=(6e-4, 1e-5), phonetic_weight=0.5, ctc_weight=1.0)),
)
NATURAL_UTTERANCES, MIXED_UTTERANCES = 18_000, 6_000
CAUSAL_ROUNDS = (  # steps, first rate, share of the natural voices; one goes on from the other
    (4000, 1.2e-3, 0.35),
    (2800, 9.0e-4, 0.3),
)
MIXED_SHARE, CORPUS_SHARE = 0.4, 0.25


def make_tokenizer(folder: Path) -> Path:
    """Trains the SentencePiece model on the training texts, once. Returns its folder."""
    if not (folder / "tokenizer.model").exists():
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
    return folder


def make_speech(folder: Path, script: str, *options: str) -> Path:
    """Synthesizes training speech, unless that was done before. Returns its folder."""
    if not (folder / "train.jsonl").exists():
        subprocess.run([sys.executable, str(CORPUS / script), str(folder), *options], check=True)
    return folder


def make_full(work: Path) -> Path:
    """Trains the encoder with full context, or goes on with it. Writes and returns its archive."""
    rounds = []
    for texts, utterances, options in ROUNDS:
        plan = ("--texts", texts, "--utterances", str(utterances))
        speech = make_speech(work / texts, "make_pretraining_speech.py", *plan)
        rounds.append(Round(manifest=speech / "train.jsonl", **options))
    tokenizer = make_tokenizer(work / "tokenizer")
    config = settings.load(
        PARTS / "tiny_encoder.yaml", [f"model.tokenizer.dir={tokenizer}"], complete=False
    )
    model = CTCModel(config["model"])
    model.variables = pretrain(model, rounds, work / "state.npz")
    return write(model, TARGET)


def make_causal(work: Path, full: Path) -> Path:
    """Trains the causal encoder, or goes on with it. Writes and returns its archive."""
    natural = make_speech(
        *(work / "natural", "make_natural_speech.py", "--utterances", str(NATURAL_UTTERANCES))
    )
    plan = ("--texts", "mixed", "--utterances", str(MIXED_UTTERANCES), "--no-list")
    mixed = make_speech(work / "causal_mixed", "make_pretraining_speech.py", *plan)
    overlay, model = PARTS / "tiny_encoder_causal.yaml", CTCModel.from_pretrained(full)
    tokenizer = work / "causal_tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "tokenizer.model").write_bytes(model.tokenizer.serialized())
    start = causal_start(model, tokenizer, overlay, work / "causal_start.nemo")
    for number, (steps, rate, share) in enumerate(CAUSAL_ROUNDS):
        shares = {natural: share, mixed: MIXED_SHARE, ROOT / "corpus": CORPUS_SHARE}
        data = work / f"causal{number}.yaml"
        data.write_text(json.dumps(causal_settings(steps, rate, shares)))
        run = work / f"causal{number}"
        command = [
            *(sys.executable, str(ROOT / "train.py"), "--config", "parts/tiny_encoder"),
            *("--config", "parts/tiny_encoder_causal", "--config", str(data)),
            f"+model.init_from_checkpoint={start}",
            f"model.tokenizer.dir={tokenizer}",
            f"exp_manager.explicit_log_dir={run}",
        ]
        subprocess.run(command, check=True)
        start = run
    return write(CTCModel.from_pretrained(start), CAUSAL_TARGET)


def causal_settings(steps: int, rate: float, shares: dict[Path, float]) -> dict[str, Any]:
    """What a round of the causal encoder sets: steps, rate, and shares of folders of speech."""
    entries = [
        {
            "type": "lhotse_as_conversation",
            "manifest_filepath": str(folder / "train.jsonl"),
            "weight": share,
        }
        for folder, share in shares.items()
    ]
    validation = [
        {
            "type": "lhotse_as_conversation",
            "manifest_filepath": str(ROOT / "corpus" / "validation.jsonl"),
        }
    ]
    return {
        "model": {"optimizer": {"lr": rate}},
        "trainer": {"max_steps": steps, "limit_train_batches": 1400, "limit_val_batches": None},
        "data": {
            "train_ds": {"input_cfg": entries, "perturb_speed": True},
            "validation_ds": {"datasets": {"val": {"input_cfg": validation}}},
        },
    }


def write(model: CTCModel, target: Path) -> Path:
    """Writes the archive, its weights in bf16."""
    model.save_to(target, dtype=ml_dtypes.bfloat16, compressed=True)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    return target


def main() -> None:
    """Makes what is missing, trains to the end, and writes the archives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--first", type=Path, help="an encoder with full context that is there")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    keep_compiled_programs("auto")
    full = arguments.first.resolve() if arguments.first else make_full(work)
    make_causal(work, full)


if __name__ == "__main__":
    main()
