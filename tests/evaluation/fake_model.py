"""A model whose output is known: its text is the length of the recording."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EOS, PAD = 1, 0
WORDS = ["<pad>", "</s>", "<extra>", "zero", "one", "two", "three", "four", "five"]


class FakeTokenizer:
    def require(self, token: str, why: str) -> int:
        if token not in WORDS:
            raise ValueError(f"{why} needs the token {token!r}, which this tokenizer lacks")
        return WORDS.index(token)

    def ids_to_text(self, ids: Any) -> str:
        return " " + " ".join(WORDS[i] for i in ids)


@partial(jax.jit, static_argnames=("width",))
def _generated(lengths: Any, *, width: int) -> Any:
    """Sequences of: whole seconds as a word, an extra end token, the end token, then rubbish."""
    word = jnp.minimum(lengths // 16_000, 5) + 3
    columns = [word, jnp.full_like(word, 2), jnp.full_like(word, EOS), jnp.full_like(word, 3)]
    return jnp.stack(columns[:width], axis=1)


class FakeModel:
    audio_locator_tag = "<|audio|>"
    sampling_rate = 16_000
    prompt_formatter = None
    text_bos_id = None
    text_eos_id = EOS
    text_pad_id = PAD
    mesh = None

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.calls: list[dict[str, Any]] = []

    def generate(self, prompts: Any, **options: Any) -> np.ndarray:
        self.calls.append({"prompts": prompts, **options})
        return np.asarray(_generated(jnp.asarray(options["audio_lens"]), width=4))

    def eval(self) -> "FakeModel":
        return self
