"""What the fields of Canary's prompts may hold, and the special tokens that they become.

Values as in NeMo: a word of a manifest ("yes", "asr", "en") or the token itself.
"""

from collections.abc import Callable, Mapping

Field = Callable[[str], str]
"""From the value of a field to the text that the prompt has. Raises ValueError for another one."""

_YES = ("yes", "Yes", "true", "True", "1")
_NO = ("no", "No", "false", "False", "0")
_EMOTIONS = tuple(f"<|emo:{e}|>" for e in ("undefined", "neutral", "angry", "happy", "sad"))
_TASKS = {
    "<|transcribe|>": ("asr", "transcribe", "<|transcribe|>"),
    "<|translate|>": ("ast", "translate", "s2t_translation", "<|translate|>"),
}


def language(value: str) -> str:
    """`en` -> `<|en|>`."""
    return value if value.startswith("<|") and value.endswith("|>") else f"<|{value}|>"


def target_language(value: str) -> str:
    """`de` -> `<de>`, for translation models of text."""
    return value if value.startswith("<") and value.endswith(">") else f"<{value}>"


def _task(value: str) -> str:
    for token, names in _TASKS.items():
        if value in names:
            return token
    raise ValueError(f"one of {', '.join(name for names in _TASKS.values() for name in names)}")


def _emotion(value: str) -> str:
    if value not in _EMOTIONS:
        raise ValueError(f"one of {', '.join(_EMOTIONS)}")
    return value


def _switch(name: str) -> Field:
    """`yes` -> `<|name|>`, `no` -> `<|noname|>`."""
    true, false = f"<|{name}|>", f"<|no{name}|>"

    def switch(value: str) -> str:
        if value not in (*_YES, *_NO, name, f"no{name}", true, false):
            raise ValueError(f"yes, no, {true} or {false}")
        return true if value in (*_YES, name, true) else false

    return switch


CANARY: Mapping[str, Field] = {
    "source_lang": language,
    "target_lang": language,
    "task": _task,
    "pnc": _switch("pnc"),
}
CANARY2: Mapping[str, Field] = {
    "source_lang": language,
    "target_lang": language,
    "emotion": _emotion,
    **{name: _switch(name) for name in ("pnc", "itn", "timestamp", "diarize")},
}
