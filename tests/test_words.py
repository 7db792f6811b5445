"""The glossary of CONTRIBUTING.md holds: no retired name, word or phrase is left in code or text.

`RIGHT_HERE` and `RIGHT_AS` list the uses that are right in another sense, with the reason.
"""

import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("speechlm2_jax", "tests", "tools", "benchmarks", "docs", "corpus")
MAX_COLUMNS = 120
LEFT_OUT = (
    "tests/data/",  # made by the originals
    "tests/test_words.py",
    "tools/corpus/",  # sentences of the corpus, and their vocabulary
    "tools/make_tiny_llm.py",  # likewise
    "CONTRIBUTING.md",  # the glossary
    "CHANGELOG.md",  # tells of the past
)

NAMES = {
    "is_key": "attention_mask, or key_mask for a mask over the keys alone",
    "go_on": "decode (a model), resume (a run)",
    "unbind": "split",
    "Visible": "AttentionMask",
    "Opening": "RunContext",
    "Parts": "a name that tells which parts",
    "Meter": "Throughput",
    "Cadence": "Intervals",
    "objection": "validation_error",
    "hand_over": "put_global",
    "pass_on": "ring_permute",
    "whole_rows": "unsharded_time",
    "deal": "split_evenly",
    "Spoken": "DuplexOutput",
    "Recogniser": "ASRModel",
    "EarlierAnswer": "a name with `response` or `hypothesis`",
}
"""Whole identifiers -> what replaced them."""

WORDS = {
    "heard": "encoder_output, audio, encoded",
    "hear": "encode, transcribe",
    "hears": "encodes, transcribes",
    "hearing": "encoding",
    "listen": "encode, transcribe",
    "listens": "encodes, transcribes",
    "listening": "encoding, audio_inputs",
    "said": "text, text_tokens, generated, logged",
    "says": "generates, logs, names; summary()",
    "speak": "generate, generate audio",
    "speaks": "generates, generates audio",
    "talk": "conversation, run_duplex",
    "talks": "conversations",
    "recogniser": "ASR model",
    "recognisers": "ASR models",
    "recognise": "transcribe",
    "recognises": "transcribes",
    "seam": "stage",
    "seams": "stages",
    "law": "invariant",
    "laws": "invariants",
    "rooms": "packages, modules",
    "objection": "validation_error",
    "objections": "validation errors",
    "answer": "generate, generation, inference; response; hypothesis",
    "answers": "generates; responses, hypotheses",
    "answered": "generated",
    "answering": "generation, inference",
}
"""Words, also as parts of identifiers -> what replaced them."""

PHRASES = {
    r"what (a|the) user holds": "the user-facing model classes",
    r"is not (done|had)": "is not supported",
    r"(writes?|wrote) (speech )?down": "transcribes",
    r"written down": "transcribed",
    r"goes on where": "resumes from",
    r"turn(s|ed) round": "transposed",
    r"(shared|shares?) out": "sharded, split",
    r"cut along": "sharded along",
    r"la(id|ys?) out": "layout",
    r"learns? by heart": "overfits",
    r"that (is|are) not here": "that is not attached, not installed, not found",
    r"words of (a|the) command": "arguments",
    r"where (they|it) lies?": "in place",
    r"first of this start": "first step after (re)start",
    r"in sight": "available",
    r"is no \w+ that": "is not a ..., expected",
}
"""Regular expressions over text with single spaces -> what replaced them."""

RIGHT_HERE = {
    "rooms": {"reverberation": ("corpus/",)},
    "talk": {
        "an option of the benchmarks": ("benchmarks/",),
        "the command `speechlm2-jax talk`": (
            "README.md",
            "docs/serve.md",
            "docs/sessions.md",
            "docs/talk.md",
            "speechlm2_jax/cli.py",
            "speechlm2_jax/serving/duplex/",
        ),
    },
    "Spoken": {"the name of a data set": ("docs/digits.md",)},
}
"""Word or name -> why it is right in another sense -> files and folders where it is."""

RIGHT_AS = {
    r"\banswer_ids\b": "a field of NeMo's prompt formatters",
    r'"\w*answer\w*"': "keys of recorded files; a choice of the benchmarks' --only",
    r"--answer\b|\b(arguments|sizes)\.answer\b": "an option of the benchmarks",
    r"def answer\(|model\.answer\(": "SALM.answer is public",
    r"\banswers((_swapped|_noise_\d+dB)*|{changed})\.jsonl": "a file that evaluate.py writes",
    r"\banswers: ": "that file in its output",
    r'"answers"|`answers`': "a folder that evaluate.py writes",
    r'"heard"|`heard`': "a key of answers.jsonl",
}
"""Text that is right wherever it is -> why."""

SAME_NAME_ALLOWED = {
    "Trainer": "slm.Trainer, and the trainer of any TrainableModel below it",
}


@cache
def texts() -> dict[str, str]:
    """Every Python file and page of the project."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("*.md")]
    for folder in FOLDERS:
        paths += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md")]
    named = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return {name: named[name].read_text(encoding="utf-8") for name in sorted(named)}


def judged() -> dict[str, str]:
    return {name: text for name, text in texts().items() if not name.startswith(LEFT_OUT)}


@cache
def uses() -> dict[str, Counter[str]]:
    """Retired thing -> how often each file uses it."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    identifier = re.compile(r"[A-Za-z_]+")
    part = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
    phrases = {pattern: re.compile(pattern) for pattern in PHRASES}
    right = re.compile("|".join(RIGHT_AS))
    for name, text in judged().items():
        text = right.sub("", text)
        names = Counter(identifier.findall(text))
        words: Counter[str] = Counter()
        for known, count in names.items():
            for word in part.findall(known):
                words[word.lower()] += count
        flat = re.sub(r"[\s#]+", " ", text)
        counts = {key: names[key] for key in NAMES} | {key: words[key] for key in WORDS}
        counts |= {key: len(compiled.findall(flat)) for key, compiled in phrases.items()}
        for key, count in counts.items():
            if count and not is_right(key, name):
                found[key][name] = count
    return found


def is_right(key: str, name: str) -> bool:
    """True if a file may use a retired word in another sense."""
    return any(name.startswith(places) for places in RIGHT_HERE.get(key, {}).values())


def test_no_retired_word_is_left():
    instead = NAMES | WORDS | PHRASES
    problems = [
        f"{key!r}: {sum(files.values())} uses; write {instead[key]} "
        f"({', '.join(name for name, _ in files.most_common(5))})"
        for key, files in uses().items()
    ]
    assert not problems, "\n".join(problems)


def test_right_uses_exist():
    """What is listed as right is used: a stale entry would hide new uses."""
    everything = "\n".join(judged().values())
    assert all(re.search(pattern, everything) for pattern in RIGHT_AS)
    for key, reasons in RIGHT_HERE.items():
        for place in (place for places in reasons.values() for place in places):
            own = [text for name, text in judged().items() if name.startswith(place)]
            assert any(re.search(key, text) for text in own), (key, place)


def test_one_class_name_is_one_class():
    places: dict[str, list[str]] = defaultdict(list)
    for name, text in texts().items():
        if name.startswith("speechlm2_jax/"):
            for found in re.findall(r"^class (\w+)", text, re.MULTILINE):
                places[found].append(name)
    twice = {
        name: files
        for name, files in places.items()
        if len(files) > 1 and not name.startswith("_") and name not in SAME_NAME_ALLOWED
    }
    assert not twice


def prose(text: str) -> list[tuple[int, str]]:
    """Lines of a page outside tables and code, with their numbers."""
    lines, in_code = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.lstrip().startswith("|"):
            lines.append((number, line))
    return lines


WIDE: dict[str, int] = {}
"""Lines of pages that are too long still; numbers may only fall."""


def test_prose_wraps():
    for name, text in texts().items():
        if name.endswith(".md") and not name.startswith("tests/data/salm/"):
            wide = [n for n, line in prose(text) if len(line) > MAX_COLUMNS]
            assert len(wide) <= WIDE.get(name, 0), f"{name}: lines {wide[:5]} are too long"
