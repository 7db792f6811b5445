"""Folder of recordings -> manifests of its sets, and a list of what was left out."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from speechlm2_jax.console import counted
from speechlm2_jax.data.folders.checks import Checked, check_recordings
from speechlm2_jax.data.folders.layouts import Folder, Found, read_folder
from speechlm2_jax.data.folders.naming import SET_NAMES, TRAIN
from speechlm2_jax.data.folders.splitting import LEFT_OUT_SET, far_off, parse_shares, split
from speechlm2_jax.data.output_folders import check_writable
from speechlm2_jax.settings import SettingsError

LEFT_OUT = f"{LEFT_OUT_SET}.jsonl"
CAUSES = {
    "no_text": "without a text",
    "empty_text": "with an empty text",
    "copy": "the same samples as another",
    "twice": "listed twice with different texts",
    "silent": "silent",
    "too_short": "shorter than --min-duration",
    "too_long": "longer than --max-duration",
    "missing": "not there, but named by a list or a link",
    "unlisted": "named by no list that is read",
    "no_set": "in none of the folder's sets (--resplit takes them)",
}
"""Why a recording is left out, beside the causes of an AudioError, and the words for it."""

MOST_LETTERS_PER_S = 40
"""Letters of text per second that are too many for one second; fast speech has about 25."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording with its text, as its folder has them, and what it is like."""

    found: Found
    checked: Checked

    def row(self, folder: Path) -> dict[str, Any]:
        """Its row of a manifest in `folder`; the path is relative to that folder, or absolute."""
        row: dict[str, Any] = {
            "audio_filepath": _path_from(folder, self.found.audio),
            "duration": round(self.checked.duration_s, 4),
            "text": self.found.text,
        }
        return row if self.found.speaker is None else row | {"speaker": self.found.speaker}


@dataclass(frozen=True)
class LeftOut:
    """A recording, or a row of a list, that no manifest has."""

    audio: Path
    cause: str
    """A key of CAUSES, or the cause of an AudioError."""
    where: str | None = None
    """The line or file that names it; None if none does."""

    def row(self, folder: Path) -> dict[str, Any]:
        """Its row of left_out.jsonl in `folder`, with its path as in a manifest there."""
        row = {"audio_filepath": _path_from(folder, self.audio), "cause": self.cause}
        return row if self.where in (None, str(self.audio)) else row | {"where": self.where}


def _path_from(folder: Path, audio: Path) -> str:
    """The path of a recording as a manifest in `folder` has it: relative to it, or absolute."""
    whole = audio.absolute()
    return (whole.relative_to(folder) if whole.is_relative_to(folder) else whole).as_posix()


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How a folder becomes manifests."""

    output: Path | None = None
    """Folder of the manifests; None: the folder of the recordings."""
    split: str = "train=0.9,validation=0.05,test=0.05"
    """Sets and their shares of the seconds, where the folder has no sets of its own."""
    resplit: bool = False
    """Split by `split` also what the folder has in sets."""
    by: Literal["auto", "speaker", "file"] = "auto"
    """What no two sets share. auto: speakers if all are known, else files."""
    seed: int = 0
    min_duration: float = 0.1
    """Seconds; shorter recordings are left out."""
    max_duration: float = 40.0
    """Seconds; longer recordings are left out."""
    keep_copies: bool = False
    """Keep recordings with the same samples."""
    overwrite: bool = False
    """Replace manifests that are there."""


def make_manifests(root: Path, choices: Choices) -> list[str]:
    """Writes a manifest for each set, and left_out.jsonl. Returns what was found, as lines.

    Raises SettingsError for a folder without usable recordings, for a list that cannot be read, for
    sets that cannot be filled, and for manifests that are there already.
    """
    shares = parse_shares(choices.split)
    output = (choices.output or root).absolute()
    folder, left_out = read_folder(root), list[LeftOut]()
    kept_sets = () if choices.resplit else sets_of_its_own(folder)
    if kept_sets:
        folder = _in_sets(folder, left_out)
    targets = {name: output / f"{name}.jsonl" for name in kept_sets or shares}
    present = [path for path in targets.values() if path.exists()]
    if present and not choices.overwrite:
        raise SettingsError(f"{present[0]} is there already; add --overwrite, or --output")
    check_writable(output, "--output")
    left_out += [LeftOut(path, "unlisted") for path in folder.unlisted]
    kept = _usable(folder, choices, left_out)
    if not kept:
        counts = ", ".join(_counted(left_out))
        raise SettingsError(f"{root}: no recording can be used: {counts}")
    parts, how = _parts(kept, kept_sets, shares, choices)
    targets = {name: path for name, path in targets.items() if parts[name]}
    output.mkdir(parents=True, exist_ok=True)
    for name, path in targets.items():
        _write(path, (one.row(output) for one in parts[name]))
    _write(output / LEFT_OUT, (one.row(output) for one in left_out))
    return _report(folder, kept, left_out, parts, targets, how)


def sets_of_its_own(folder: Folder) -> tuple[str, ...]:
    """The sets in which a folder has its recordings, train first; none if none is held out.

    Recordings without a set are of the training set if nothing else is.
    """
    names = {one.set for one in folder.recordings}
    if not names - {TRAIN, None} or len(names) < 2:
        return ()
    has_train = bool(names & {TRAIN, None})
    order = dict.fromkeys(SET_NAMES.values())
    return tuple(name for name in order if name in names or (has_train and name == TRAIN))


def _in_sets(folder: Folder, left_out: list[LeftOut]) -> Folder:
    """A folder with sets of its own, each recording in one; those in none are added to `left_out`.

    If there is no training set, those in none are it.
    """
    has_train = any(one.set == TRAIN for one in folder.recordings)
    placed = [r if has_train else replace(r, set=r.set or TRAIN) for r in folder.recordings]
    left_out += [LeftOut(one.audio, "no_set", one.where) for one in placed if one.set is None]
    return replace(folder, recordings=tuple(one for one in placed if one.set is not None))


def _parts(
    kept: Sequence[Recording],
    kept_sets: Sequence[str],
    shares: Mapping[str, float],
    choices: Choices,
) -> tuple[Mapping[str, Sequence[Recording]], list[str]]:
    """The recordings of each set, and what to tell of how they came there."""
    if kept_sets:
        parts = {name: [one for one in kept if one.found.set == name] for name in kept_sets}
        return parts, _kept_lines(parts, [name for name in shares if name not in parts])
    groups, seconds, is_by_speaker = _groups(kept, choices.by)
    parts = split(groups, seconds, shares, seed=choices.seed)
    what = "speaker" if is_by_speaker else "file"
    lines = [f"split by {what}s: {choices.split}"]
    if any(one.found.set for one in kept):
        own = sorted({one.found.set or "none" for one in kept})
        lines[0] += f"; the folder's own sets ({', '.join(own)}) are not kept"
    got_s = {name: sum(one.checked.duration_s for one in part) for name, part in parts.items()}
    if wrong := far_off(got_s, shares):
        told = ", ".join(
            f"{name} {own:.0%} (not {shares[name]:.0%})" for name, own in wrong.items()
        )
        hint = "; --by file splits the recordings of each speaker" if is_by_speaker else ""
        few = counted(len(groups), what)
        lines.append(f"warning: {few} cannot be divided so: {told} of the time{hint}")
    return parts, lines


def _kept_lines(parts: Mapping[str, Sequence[Recording]], missing: Sequence[str]) -> list[str]:
    """What to tell of sets that a folder has itself, and of those it lacks."""
    names = ", ".join(parts) + (f" (no {', '.join(missing)})" if missing else "")
    lines = [f"kept the folder's own sets: {names}; --resplit splits them anew"]
    lines += [f"warning: no recording of {name} can be used" for name, p in parts.items() if not p]
    of_speaker: dict[str, set[str]] = defaultdict(set)
    for name, part in parts.items():
        for one in part:
            if one.found.speaker is not None:
                of_speaker[one.found.speaker].add(name)
    if shared := sum(len(names) > 1 for names in of_speaker.values()):
        lines.append(f"warning: in more than one of them: {counted(shared, 'speaker')}")
    return lines


def _usable(folder: Folder, choices: Choices, left_out: list[LeftOut]) -> list[Recording]:
    """The recordings that can be trained on; the others are added to `left_out`."""
    checked = check_recordings([one.audio for one in folder.recordings])
    seen: set[str] = set()
    texts: dict[Path, str | None] = {}
    kept = []
    for found, check in zip(folder.recordings, checked, strict=True):
        cause = _cause(found, check, choices)
        if cause is None and check.content in seen and not choices.keep_copies:
            other = texts.get(found.audio.resolve(), found.text)
            cause = "copy" if found.text == other else "twice"
        if cause is None:
            seen.add(check.content)
            texts[found.audio.resolve()] = found.text
            kept.append(Recording(found=found, checked=check))
        else:
            left_out.append(LeftOut(found.audio, cause, found.where))
    return kept


def _cause(found: Found, check: Checked, choices: Choices) -> str | None:
    """Why a recording is left out; None if it is not."""
    if check.problem is not None:
        return check.problem
    if not found.text:
        return "no_text" if found.text is None else "empty_text"
    if check.is_silent:
        return "silent"
    if check.duration_s < choices.min_duration:
        return "too_short"
    return "too_long" if check.duration_s > choices.max_duration else None


def _groups(
    kept: Sequence[Recording], by: str
) -> tuple[Mapping[str, list[Recording]], Mapping[str, float], bool]:
    """What no two sets may share, with its seconds: speakers if all are known, else files.

    Last: whether it is speakers.
    """
    unknown = [one for one in kept if one.found.speaker is None]
    if by == "speaker" and unknown:
        raise SettingsError(
            f"--by speaker: without a speaker: {counted(len(unknown), 'recording')}, as "
            f"{unknown[0].found.where}"
        )
    speakers = {one.found.speaker for one in kept}
    is_by_speaker = by == "speaker" or (by == "auto" and not unknown and len(speakers) > 2)
    groups: dict[str, list[Recording]] = defaultdict(list)
    for one in kept:
        groups[str(one.found.speaker if is_by_speaker else one.checked.content)].append(one)
    seconds = {key: sum(one.checked.duration_s for one in group) for key, group in groups.items()}
    return groups, seconds, is_by_speaker


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines; the file is there whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    os.replace(draft, path)


def _counted(left_out: Iterable[LeftOut]) -> list[str]:
    counts = Counter(one.cause for one in left_out).most_common()
    return [f"{count} {CAUSES.get(cause, cause)}" for cause, count in counts]


def _report(
    folder: Folder,
    kept: Sequence[Recording],
    left_out: Sequence[LeftOut],
    parts: Mapping[str, Sequence[Recording]],
    targets: Mapping[str, Path],
    how: Sequence[str],
) -> list[str]:
    """The lines for the terminal; `how` tells how the recordings came into their sets."""
    lines = [f"layout: {folder.layout}; {_amount(kept)}", *how]
    if left_out:
        place = next(iter(targets.values())).with_name(LEFT_OUT)
        lines.insert(1, f"left out: {', '.join(_counted(left_out))}; see {place}")
    noticed = [f"{count} clipped" for count in [sum(r.checked.is_clipped for r in kept)] if count]
    fast = sum(len(r.found.text or "") > MOST_LETTERS_PER_S * r.checked.duration_s for r in kept)
    if fast:
        noticed.append(f"{fast} with over {MOST_LETTERS_PER_S} letters a second: a wrong text?")
    rates = Counter(one.checked.rate_hz for one in kept)
    noticed.append("rates " + ", ".join(f"{r} Hz ({n})" for r, n in rates.most_common()))
    sets = defaultdict(set)
    for name, part in parts.items():
        for one in part:
            sets[(one.found.text or "").lower()].add(name)
    if shared := sum(len(names) > 1 for names in sets.values()):
        noticed.append(f"{counted(shared, 'text')} in more than one set")
    place = next(iter(targets.values())).parent
    others = {*place.glob("*.jsonl")} - {*targets.values(), place / LEFT_OUT}
    if others:
        names = ", ".join(sorted(path.name for path in others))
        noticed.append(f"{names} of before is there too, and may have the same recordings")
    lines.append(f"noticed: {'; '.join(noticed)}")
    for name, path in targets.items():
        speakers = len({one.found.speaker for one in parts[name]} - {None})
        spoken = f", {counted(speakers, 'speaker')}" if speakers else ""
        lines.append(f"{path}: {_amount(parts[name])}{spoken}")
    return lines


def _amount(recordings: Sequence[Recording]) -> str:
    """How many recordings, and how long they are: in minutes, or in seconds below one."""
    seconds = sum(one.checked.duration_s for one in recordings)
    time = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
    return f"{counted(len(recordings), 'recording')}, {time}"
