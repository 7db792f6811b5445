"""Makes the manifests of the recipe ljspeech: read English prose.

    python tools/prepare_ljspeech.py OUT_FOLDER FOLDER

FOLDER is the unpacked archive LJSpeech-1.1 (public domain; metadata.csv and wavs/), or a folder
with train.jsonl (a manifest with `audio_filepath` and `text`). Which set a recording is in follows
from its name. Writes train.jsonl, validation.jsonl and test.jsonl, and tokenizer.model of the
bundled encoder, which its own fine-tuning needs. Texts are lower-case words of a to z and the
apostrophe, numbers spelt out; `text_raw` is what they were. Rows whose text has other signs, such
as a currency, and rows without a readable recording are left out and listed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import argparse
import hashlib
import json
import tarfile
from collections.abc import Iterator

import soundfile

sys.path.append(str(Path(__file__).resolve().parent / "corpus"))
from plain_text import plain_text

ENCODER = Path(__file__).resolve().parents[1] / "configs/parts/tiny_encoder.nemo"
TEST_SHARE, VALIDATION_SHARE = 0.15, 0.1


def read_texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each recording and its text. Raises ValueError for a folder of no known form."""
    table, manifest = folder / "metadata.csv", folder / "train.jsonl"
    if table.exists():
        for line in table.read_text(encoding="utf-8").splitlines():
            name, *texts = line.split("|")
            yield folder / "wavs" / f"{name}.wav", texts[-1]  # numbers are spelt out in the last
    elif manifest.exists():
        for line in manifest.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield folder / row["audio_filepath"], row["text"]
    else:
        raise ValueError(f"{folder} has neither metadata.csv nor train.jsonl")


def read_rows(folder: Path) -> tuple[list[dict], list[str]]:
    """A row for every recording that can be used, and a line for each that is left out."""
    rows, left_out = [], []
    for path, raw in read_texts(folder):
        try:
            text = plain_text(raw)
            duration_s = soundfile.info(path).duration
        except (ValueError, soundfile.LibsndfileError) as error:
            left_out.append(f"{path.name}: {error}")
            continue
        if not text:
            left_out.append(f"{path.name}: no words")
            continue
        rows.append(
            {
                "audio_filepath": str(path),
                "duration": round(duration_s, 4),
                "text": text,
                "text_raw": raw,
            }
        )
    return rows, left_out


def set_of(row: dict) -> str:
    """The set of a recording, by its name without the suffix."""
    name = Path(row["audio_filepath"]).stem
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def main(out: Path, folder: Path) -> None:
    """Writes the manifests and the tokenizer."""
    rows, left_out = read_rows(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "test"):
        own = [row for row in rows if set_of(row) == name]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        minutes = sum(row["duration"] for row in own) / 60
        print(f"{name}.jsonl: {len(own)} recordings, {minutes:.1f} minutes")
    print(f"left out: {len(left_out)}")
    for line in left_out:
        print(f"  {line}")
    with tarfile.open(ENCODER) as archive:
        member = next(name for name in archive.getnames() if name.endswith("tokenizer.model"))
        file = archive.extractfile(member)
        assert file is not None
        (out / "tokenizer.model").write_bytes(file.read())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    main(arguments.out.resolve(), arguments.folder.resolve())
