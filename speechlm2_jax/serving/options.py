"""The settings of a server."""

import ipaddress
from dataclasses import dataclass

MIB = 1 << 20
PROMPT = "Transcribe the following:"
"""The prompt of canary-qwen-2.5b, for a model whose training does not tell another."""
MAX_AUDIO_S = 40.0
"""The longest audio that canary-qwen-2.5b was trained on."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What every server takes; times in seconds."""

    model: str
    """A run directory, a saved model or a hub name."""
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    """The name of the model in the API; by default the last part of `model`."""
    dtype: str = "float32"
    api_keys: tuple[str, ...] = ()
    access_log: bool = True
    """Whether each request is logged: method, path, status and seconds."""
    max_body_bytes: int = 128 * MIB
    body_timeout_s: float = 60.0
    """To send a request."""
    drain_timeout_s: float = 120.0
    """After SIGTERM, for requests under way."""

    def __post_init__(self) -> None:
        keys = tuple(key.strip() for key in self.api_keys)
        if not all(keys):
            raise ValueError("--api-key: a key is empty; give one, or leave the argument out")
        object.__setattr__(self, "api_keys", keys)

    @property
    def is_open(self) -> bool:
        """Whether other machines can send requests without a key."""
        try:
            is_local = ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            is_local = self.host == "localhost"
        return not is_local and not self.api_keys

    @property
    def served_name(self) -> str:
        """The name of the model in the API."""
        return self.name or self.model.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServerOptions):
    """What `serve` takes; times in seconds."""

    strategy: str | None = None
    """auto: the weights lie on all devices."""
    quantize: str | None = None
    kv_cache_dtype: str | None = None
    aligner: str = ""
    """An ASR model that finds the times of words; by default the model's own; none: no model."""
    prompt: str = ""
    """The user's turn of a transcription; the recording follows it.

    By default that of the training, else PROMPT.
    """
    language: str | None = None
    """The language that requests may name; None: they may name none."""
    slots: int = 16
    max_queue: int = 64
    """Requests beyond the number of slots, from their headers on; further ones get 429."""
    max_new_tokens: int = 256
    max_prompt_tokens: int | None = None
    max_audio_s: float = 0.0
    """Longer recordings are cut: at pauses as by `transcribe`; in chats into chunks.

    0: the longest of the training, else MAX_AUDIO_S.
    """
    max_duration_s: float = 3600.0
    """Longer recordings are refused."""
    decode_timeout_s: float = 120.0
    """To decode a recording."""
    request_timeout_s: float = 600.0
    """From the headers of a request to its whole response."""
    tokens_at_once: int = 4
    prefill_tokens: int = 128
    audio_workers: int = 2
