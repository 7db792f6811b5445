r"""Compares the logits of an LLM with quantized weights or KV cache with those of fp32.

    python -m benchmarks.quantized DIR README.md docs/data.md

`DIR` is a Hugging Face directory. The texts are cut into windows of `--tokens` tokens, and every
position is compared: `kl` is the mean Kullback-Leibler divergence from the distribution of fp32 in
nats, `top1` the share of positions with the same most likely token, `rms` the root mean square of
the change over that of the logits, `max` the largest change, `loss` the cross-entropy of the text.
`layers only` leaves embedding table and output layer in fp32.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks import timing
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.readers import open_weights, read_json
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.layers.module import abstract, describe, merge, split
from speechlm2_jax.layers.quantized_layers import quantize_module
from speechlm2_jax.llm.decoder import Decoder

VARIANTS: dict[str, tuple[str | None, bool, str | None]] = {
    "bfloat16": (None, True, None),
    "int8": ("int8", True, None),
    "int8, layers only": ("int8", False, None),
    "fp8": ("fp8", True, None),
    "KV cache int8": (None, True, "int8"),
    "KV cache fp8": (None, True, "fp8"),
    "int8, KV cache int8": ("int8", True, "int8"),
}
"""Name -> (format of the weights, whether that of the table too, format of the KV cache)."""


def load(directory: Path) -> tuple[Any, dict[str, Array]]:
    """The LLM: (graphdef, fp32 variables)."""
    config = decoder_config(read_json(directory / "config.json"))
    module = abstract(lambda rngs: Decoder(config, rngs=rngs))
    loaded = mapping.load(open_weights(directory), decoder_table(config), describe(module))
    return split(module)[0], {path: jnp.asarray(x, jnp.float32) for path, x in loaded.items()}


def changed(graphdef: Any, variables: dict[str, Array], name: str) -> tuple[Any, dict[str, Array]]:
    """The LLM as a variant has it; the KV cache always takes part."""
    weights, has_table, kv_cache = VARIANTS[name]
    decoder: Decoder = merge(graphdef, variables)
    for part in (decoder,) if has_table else (decoder.layers, decoder.remainder):
        if weights is not None and part is not None:
            quantize_module(part, weights)
    decoder.kv_cache_kind = kv_cache
    return split(decoder)


@partial(jax.jit, static_argnames=("graphdef", "dtype"))
def logits(
    graphdef: Any, variables: dict[str, Array], ids: Int[Array, "1 T"], dtype: str
) -> Float[Array, "T V"]:
    """Logits after each token; attention reads the KV cache."""
    decoder: Decoder = merge(graphdef, variables)
    positions, mask = jnp.arange(ids.shape[1])[None], jnp.ones(ids.shape, bool)
    cache = decoder.new_cache(1, ids.shape[1], dtype)
    embeds = decoder.embed(ids).astype(dtype)
    output = decoder.extend(embeds, cache, positions=positions, attention_mask=mask)
    return decoder.logits(output.hidden)[0]


@jax.jit
def compared(
    found: Float[Array, "T V"], expected: Float[Array, "T V"], ids: Int[Array, " T"]
) -> dict[str, Array]:
    """Sums over the positions of a window."""
    ours, theirs = jax.nn.log_softmax(found), jax.nn.log_softmax(expected)
    difference = found - expected
    return {
        "kl": jnp.sum(jnp.exp(theirs) * (theirs - ours)),
        "top1": jnp.sum(jnp.argmax(found, -1) == jnp.argmax(expected, -1)),
        "squares": jnp.sum(jnp.mean(difference**2, -1)),
        "expected": jnp.sum(jnp.mean(expected**2, -1)),
        "max": jnp.max(jnp.abs(difference)),
        "loss": -jnp.sum(jnp.take_along_axis(ours[:-1], ids[1:, None], axis=1)),
    }


def windows(directory: Path, texts: list[Path], tokens: int, count: int) -> list[np.ndarray]:
    """The first `count` windows of the texts."""
    tokenizer = Tokenizer(directory)
    ids = [i for text in texts for i in tokenizer.text_to_ids(text.read_text(encoding="utf-8"))]
    whole = len(ids) // tokens
    return list(np.asarray(ids[: whole * tokens], np.int32).reshape(whole, 1, tokens)[:count])


def main() -> None:
    """Measures and prints."""
    arguments = _arguments()
    graphdef, variables = load(arguments.directory)
    given = windows(arguments.directory, arguments.texts, arguments.tokens, arguments.windows)
    expected = [logits(graphdef, variables, ids, "float32") for ids in given]
    positions = sum(ids.size for ids in given)
    size = sum(x.nbytes for x in variables.values())
    rows = []
    for name in arguments.only or VARIANTS:
        made, small = changed(graphdef, variables, name)
        dtype = "bfloat16" if name == "bfloat16" else "float32"
        if dtype == "bfloat16":
            small = {path: x.astype(dtype) for path, x in small.items()}
        total: dict[str, float] = {}
        for ids, reference in zip(given, expected, strict=True):
            for key, value in compared(logits(made, small, ids, dtype), reference, ids[0]).items():
                joined = max if key == "max" else float.__add__
                total[key] = joined(total.get(key, 0.0), float(value))
        rows.append(
            {
                "variant": name,
                "bytes": round(sum(x.nbytes for x in small.values()) / size, 3),
                "kl": round(total["kl"] / positions, 6),
                "top1": round(total["top1"] / positions, 4),
                "rms": round((total["squares"] / total["expected"]) ** 0.5, 5),
                "max": round(total["max"], 3),
                "loss": round(total["loss"] / (positions - len(given)), 4),
            }
        )
        print(rows[-1], flush=True)
    timing.report(rows, {"positions": positions, "rows": rows})


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=16, help="at most so many windows")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="variants to compare")
    return parser.parse_args()


if __name__ == "__main__":
    main()
