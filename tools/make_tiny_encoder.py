"""Makes configs/parts/tiny_encoder.nemo: a small FastConformer, trained on phonemes, then with CTC.

    python -m tools.make_tiny_encoder WORK_FOLDER [key=value ...]

WORK_FOLDER gets the tokenizer, the speech (tools/corpus/make_pretraining_speech.py, made first if
it is not there) and the run; stopped, the same command goes on. Keys are those of
configs/parts/tiny_encoder.yaml. Neither a test sentence nor a test voice is seen: the texts are
those of tools/corpus/training_texts, the voices its training voices.
"""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import sentencepiece

from speechlm2_jax import experiment
from speechlm2_jax.models.ctc import CTCModel
from tools.phonetic_pretraining import pretrain

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "configs" / "parts" / "tiny_encoder.nemo"
CORPUS = ROOT / "tools" / "corpus"
PIECES = 256
UTTERANCES = 16_000
PHONETIC_STEPS, CTC_STEPS = 7500, 2500
CTC_RATE = 4e-4  # where the rate of the phonetic steps ends


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


def make_speech(folder: Path) -> None:
    """Speaks the training texts, unless that was done before."""
    if (folder / "train.jsonl").exists():
        return
    script = CORPUS / "make_pretraining_speech.py"
    command = [sys.executable, str(script), str(folder), "--utterances", str(UTTERANCES)]
    subprocess.run(command, check=True)


def main(work: Path, overrides: list[str]) -> None:
    """Makes what is missing, trains to the end, and writes the archive."""
    tokenizer, speech, run = work / "tokenizer", work / "speech", work / "run"
    make_tokenizer(tokenizer)
    make_speech(speech)
    settings = [
        f"model.tokenizer.dir={tokenizer}",
        f"data.train_ds.input_cfg.0.manifest_filepath={speech / 'train.jsonl'}",
        f"data.validation_ds.datasets.val.input_cfg.0.manifest_filepath={speech / 'val.jsonl'}",
        f"exp_manager.explicit_log_dir={run}",
        f"trainer.max_steps={CTC_STEPS}",
        f"model.optimizer.lr={CTC_RATE}",
        *overrides,
    ]
    built = experiment.build(ROOT / "configs" / "parts" / "tiny_encoder.yaml", settings)
    if not (run / "checkpoints").exists():
        built.model.variables = pretrain(
            built.model, speech / "train.jsonl", PHONETIC_STEPS, work / "phonetic.npz"
        )
    if built.fit().is_finished:
        CTCModel.from_pretrained(run).save_to(TARGET, dtype=ml_dtypes.bfloat16)
        print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tools.make_tiny_encoder WORK_FOLDER [key=value ...]")
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
