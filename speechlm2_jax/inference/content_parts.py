"""Turns whose content is a list of parts, as in the chats of transformers and OpenAI."""

import base64
import binascii
import functools
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

_AUDIO_KEYS = ("audio", "path", "url", "audio_url", "input_audio")
_AUDIO_TYPES = ("audio", "audio_url", "input_audio")


def with_plain_content(
    turn: Mapping[str, object], name: str, placeholder: str
) -> Mapping[str, Any]:
    """Turns a list of parts into one text, and puts its recordings into `audio`.

    A part is a text, `{"type": "text", "text": ...}` or `{"type": "audio", "audio": ...}`. The
    recording may also be under `path`, or under `url` if it is a local file. The parts are joined
    by a space, as turns of one role are in training. Each recording becomes one `placeholder` in
    the text. A turn whose content is not a list is returned unchanged. Raises ValueError, naming
    the prompt, for another kind of part.
    """
    parts = turn.get("content")
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        return turn
    if turn.get("audio") is not None:
        raise ValueError(f"{name}: give audio as parts of the content or as audio, not both")
    texts, audio = [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and _kind(part) == "text":
            texts.append(str(part.get("text", "")))
        elif isinstance(part, Mapping) and _kind(part) in _AUDIO_TYPES:
            texts.append(placeholder)
            audio.append(_recording(part, name))
        else:
            kind = _kind(part) if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(
                f"{name}: a part of the content must have the type text or audio; got {kind!r}"
            )
    content = functools.reduce(_joined, filter(None, texts), "")
    return {**turn, "content": content, "audio": audio or None}


def _joined(before: str, after: str) -> str:
    needs_no_space = not before or before[-1].isspace() or after[0].isspace()
    return before + ("" if needs_no_space else " ") + after


def _kind(part: Mapping[str, object]) -> Any:
    """The type of a part. transformers does not require the key `type`."""
    if "type" in part:
        return part["type"]
    return "text" if "text" in part else next((k for k in _AUDIO_KEYS if k in part), None)


def _recording(part: Mapping[str, object], name: str) -> Any:
    value = next((part[key] for key in _AUDIO_KEYS if part.get(key) is not None), None)
    if part.get("array") is not None or part.get("bytes") is not None:
        return part
    if isinstance(value, Mapping) and value.get("data") is not None:
        return _decoded(value["data"], name)
    if isinstance(value, Mapping) and value.get("url") is not None:
        value = value["url"]
    if value is None:
        raise ValueError(f"{name}: an audio part must have audio, path or url")
    if part.get("sampling_rate") is not None and hasattr(value, "__array__"):
        return {"array": value, "sampling_rate": part["sampling_rate"]}
    return local_recording(value, name) if isinstance(value, str) else value


def local_recording(address: str, name: str) -> str | bytes:
    """Returns the local path of a path or `file:` URL, and the decoded bytes of a `data:` URL.

    Raises ValueError, naming the prompt, for a URL of another machine.
    """
    if address.startswith("data:"):
        return _decoded(address.partition(",")[2], name)
    parts = urlsplit(address) if "://" in address else None
    if parts is None:
        return address
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return unquote(parts.path)
    raise ValueError(f"{name}: {address} is not on this machine; download it and give its path")


def _decoded(data: str | bytes, name: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{name}: the audio is not base64 ({error})") from error
