"""Makes manifests of a folder of recordings: reads its layout, checks each file, splits them.

    python -m speechlm2_jax.data.folders.manifest my_recordings
    python -m speechlm2_jax.data.folders.manifest clips --output data --split train=0.9,test=0.1

The texts may be a text file or a JSON file beside each recording, a CSV or TSV table, or in the
layout of Common Voice, LibriSpeech, LJSpeech or a Hugging Face audiofolder. Recordings that cannot
be trained on are left out; left_out.jsonl lists them with the reason.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax import console
from speechlm2_jax.data.folders.checks import Checked, check_recordings
from speechlm2_jax.data.folders.layouts import Folder, Found, read_folder
from speechlm2_jax.data.folders.splitting import parse_shares, split
from speechlm2_jax.settings import SettingsError

PROGRAM = "manifest"
LEFT_OUT = "left_out.jsonl"
SHARES = "train=0.9,validation=0.05,test=0.05"
CAUSES = {
    "no_text": "without a text",
    "empty_text": "with an empty text",
    "copy": "the same samples as another",
    "silent": "silent",
    "too_short": "shorter than --min-duration",
    "too_long": "longer than --max-duration",
    "missing": "named by a list, but not there",
    "unlisted": "named by no list",
}
"""Why a recording is left out, beside the causes of an AudioError, and the words for it."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording with its text, as its folder has them, and what it is like."""

    found: Found
    checked: Checked

    def row(self, folder: Path) -> dict[str, Any]:
        """Its row of a manifest in `folder`; the path is relative to it where it lies below."""
        audio = self.found.audio.absolute()
        place = audio.relative_to(folder) if audio.is_relative_to(folder) else audio
        row: dict[str, Any] = {
            "audio_filepath": place.as_posix(),
            "duration": round(self.checked.duration_s, 4),
            "text": self.found.text,
        }
        return row if self.found.speaker is None else row | {"speaker": self.found.speaker}


def main(argv: Sequence[str], *, program: str = PROGRAM) -> int:
    """Writes the manifests and prints what was found. Bad input: one line, exit code 2."""
    with console.one_line_errors(program, [SettingsError]):
        options = _options(program, argv)
        shares = parse_shares(options.split)
        output = (options.output or options.folder).absolute()
        targets = {name: output / f"{name}.jsonl" for name in shares}
        if not options.overwrite:
            for path in targets.values():
                if path.exists():
                    raise SettingsError(f"{path} is there already; add --overwrite, or --output")
        folder = read_folder(options.folder)
        left_out: dict[Path, str] = dict.fromkeys(folder.unlisted, "unlisted")
        kept = _usable(folder, options, left_out)
        if not kept:
            counts = ", ".join(_counted(left_out.values()))
            raise SettingsError(f"{options.folder}: no recording can be used: {counts}")
        parts = split(*_groups(kept, options.by), shares, seed=options.seed)
        output.mkdir(parents=True, exist_ok=True)
        for name, path in targets.items():
            _write(path, (one.row(output) for one in parts[name]))
        rows = ({"audio_filepath": str(p), "cause": cause} for p, cause in left_out.items())
        _write(output / LEFT_OUT, rows)
        for line in _report(folder, kept, left_out, parts, targets):
            print(line)
    return 0


def _options(program: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="the folder of recordings")
    add("--output", type=Path, help="folder of the manifests (default: the folder itself)")
    add("--split", default=SHARES, help="sets and their shares of the seconds")
    add("--by", choices=("auto", "speaker", "file"), default="auto", help="what no two sets share")
    add("--seed", type=int, default=0, help="of the split")
    add("--min-duration", type=float, default=0.1, help="seconds; shorter ones are left out")
    add("--max-duration", type=float, default=40.0, help="seconds; longer ones are left out")
    add("--keep-copies", action="store_true", help="keep recordings with the same samples")
    add("--overwrite", action="store_true", help="replace manifests that are there")
    return parser.parse_args(argv)


def _usable(
    folder: Folder, options: argparse.Namespace, left_out: dict[Path, str]
) -> list[Recording]:
    """The recordings that can be trained on; the others get a cause in `left_out`."""
    checked = check_recordings([one.audio for one in folder.recordings])
    seen: set[str] = set()
    kept = []
    for found, check in zip(folder.recordings, checked, strict=True):
        cause = _cause(found, check, options)
        if cause is None and check.content in seen and not options.keep_copies:
            cause = "copy"
        if cause is None:
            seen.add(check.content)
            kept.append(Recording(found=found, checked=check))
        else:
            left_out[found.audio] = cause
    return kept


def _cause(found: Found, check: Checked, options: argparse.Namespace) -> str | None:
    """Why a recording is left out; None if it is not."""
    if check.problem is not None:
        return check.problem
    if not found.text:
        return "no_text" if found.text is None else "empty_text"
    if check.is_silent:
        return "silent"
    if check.duration_s < options.min_duration:
        return "too_short"
    return "too_long" if check.duration_s > options.max_duration else None


def _groups(
    kept: Sequence[Recording], by: str
) -> tuple[Mapping[str, list[Recording]], Mapping[str, float]]:
    """What no two sets may share, with its seconds: speakers if all are known, else files."""
    unknown = [one for one in kept if one.found.speaker is None]
    if by == "speaker" and unknown:
        raise SettingsError(
            f"--by speaker: {len(unknown)} recordings have no speaker, as {unknown[0].found.where}"
        )
    speakers = {one.found.speaker for one in kept}
    is_by_speaker = by == "speaker" or (by == "auto" and not unknown and len(speakers) > 2)
    groups: dict[str, list[Recording]] = defaultdict(list)
    for one in kept:
        groups[str(one.found.speaker if is_by_speaker else one.checked.content)].append(one)
    seconds = {key: sum(one.checked.duration_s for one in group) for key, group in groups.items()}
    return groups, seconds


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines; the file is there whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    os.replace(draft, path)


def _counted(causes: Iterable[str]) -> list[str]:
    return [f"{count} {CAUSES.get(cause, cause)}" for cause, count in Counter(causes).most_common()]


def _report(
    folder: Folder,
    kept: Sequence[Recording],
    left_out: Mapping[Path, str],
    parts: Mapping[str, Sequence[Recording]],
    targets: Mapping[str, Path],
) -> list[str]:
    """The lines for the terminal."""
    lines = [f"layout: {folder.layout}; {len(kept)} recordings, {_minutes(kept)}"]
    if left_out:
        place = next(iter(targets.values())).with_name(LEFT_OUT)
        lines.append(f"left out: {', '.join(_counted(left_out.values()))}; see {place}")
    noticed = [f"{count} clipped" for count in [sum(r.checked.is_clipped for r in kept)] if count]
    rates = Counter(one.checked.rate_hz for one in kept)
    noticed.append("rates " + ", ".join(f"{r} Hz ({n})" for r, n in rates.most_common()))
    sets = defaultdict(set)
    for name, part in parts.items():
        for one in part:
            sets[(one.found.text or "").lower()].add(name)
    if shared := sum(len(names) > 1 for names in sets.values()):
        noticed.append(f"{shared} texts are in more than one set")
    lines.append(f"noticed: {'; '.join(noticed)}")
    for name, path in targets.items():
        speakers = len({one.found.speaker for one in parts[name]} - {None})
        spoken = f", {speakers} speakers" if speakers else ""
        lines.append(f"{path}: {len(parts[name])} recordings, {_minutes(parts[name])}{spoken}")
    return lines


def _minutes(recordings: Sequence[Recording]) -> str:
    return f"{sum(one.checked.duration_s for one in recordings) / 60:.1f} min"


if __name__ == "__main__":
    console.ignore_closed_pipes()
    sys.exit(main(sys.argv[1:]))
