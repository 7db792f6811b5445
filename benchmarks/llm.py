r"""Times greedy decoding of an LLM alone, from a Hugging Face directory, beside transformers.

    python -m benchmarks.side_by_side "python -m benchmarks.llm DIR --batch 1" \\
        --against "python benchmarks/peers/transformers_llm.py DIR --batch 1" --cores 0

`generate_s` is a whole call: prompt of `--prompt` random tokens, then `--new` tokens. `token_s` is
the time per token after the first. `bound_s` is the time in which memcpy reads the weights once.
`--dtype`, `--quantize` and `--kv-cache` are the formats of activations, weights and KV cache.
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
from flax import nnx

from benchmarks import timing
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.quantizing import QuantizingPlace
from speechlm2_jax.conversion.readers import open_weights, read_json
from speechlm2_jax.generation import salm as loops
from speechlm2_jax.generation.decoding import DecodingConfig, Prompts
from speechlm2_jax.layers.module import Variables, abstract, describe, split
from speechlm2_jax.layers.quantized import DTYPES
from speechlm2_jax.layers.quantized_layers import quantize_module, unquantized
from speechlm2_jax.layers.unstacked import Layered, LayerViews, merge_layers
from speechlm2_jax.llm.decoder import Decoder

SEED = 0


class Llm:
    """An LLM and the two programs that generate with it."""

    def __init__(
        self,
        directory: Path,
        dtype: str = "float32",
        quantize: str | None = None,
        kv_cache: str | None = None,
    ):
        self.config = decoder_config(read_json(directory / "config.json"))
        self.dtype = dtype

        def make(rngs: nnx.Rngs) -> Decoder:
            decoder = Decoder(self.config, rngs=rngs)
            decoder.kv_cache_kind = kv_cache
            return decoder if quantize is None else quantize_module(decoder, quantize)

        module = abstract(make)
        self.graphdef, _ = split(module)
        infos, table = describe(module), decoder_table(self.config)
        place = QuantizingPlace(infos)
        loaded = mapping.load(open_weights(directory), table, unquantized(infos), place)
        loaded = {p: jnp.asarray(x, infos[p].computed_in(dtype)) for p, x in loaded.items()}
        self.variables: Variables = loaded | place.scales
        views = LayerViews("")
        self.for_prefill = views.whole(self.graphdef, self.variables)
        self.for_decode = views(self.graphdef, self.variables)

    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(value.nbytes for value in self.variables.values())

    def generate(self, ids: np.ndarray, new: int) -> np.ndarray:
        """Generates exactly `new` tokens after prompts [B, T]; greedy."""
        config = DecodingConfig(max_new_tokens=new, stop_ids=(), pad_id=0)
        lengths = jnp.full(len(ids), ids.shape[1], jnp.int32)
        state = prefill(self.graphdef, self.for_prefill, ids, lengths, config, self.dtype)
        return np.asarray(decode(self.graphdef, self.for_decode, state, config))


@partial(jax.jit, static_argnames=("graphdef", "config", "dtype"))
def prefill(
    graphdef: Any,
    variables: Variables,
    ids: jax.Array,
    lengths: jax.Array,
    config: DecodingConfig,
    dtype: str = "float32",
) -> Any:
    """Runs prompts [B, T] of `lengths` [B], padded on the right, and chooses the first tokens."""
    decoder: Decoder = merge_layers(graphdef, variables)
    prompts = Prompts(
        embeds=decoder.embed(ids).astype(dtype),
        lengths=lengths,
        attention_mask=jnp.arange(ids.shape[1])[None] < lengths[:, None],
    )
    return loops.prefill(decoder, prompts, config)


@partial(jax.jit, static_argnames=("graphdef", "config"))
def decode(graphdef: Any, variables: Layered, state: Any, config: DecodingConfig) -> jax.Array:
    """Generates the other tokens."""
    decoder: Decoder = merge_layers(graphdef, variables)
    state = loops.decode(decoder, state, config, config.max_new_tokens)
    return loops.read_outputs(state, config).ids


def main() -> None:
    """Measures and prints."""
    arguments = _arguments()
    llm = Llm(arguments.directory, arguments.dtype, arguments.quantize, arguments.kv_cache)
    shape = (arguments.batch, arguments.prompt)
    ids = np.random.default_rng(SEED).integers(100, llm.config.vocab_size // 2, shape)
    ids = ids.astype(np.int32)
    first_s = timing.measure(lambda: llm.generate(ids, 1), repeats=arguments.repeats)
    whole = timing.measure(lambda: llm.generate(ids, arguments.new), repeats=arguments.repeats)
    token_s = (whole.median_s - first_s.median_s) / (arguments.new - 1)
    result = {
        "parameters_m": round(sum(v.size for v in llm.variables.values()) / 1e6, 2),
        "generate_s": whole.as_list(),
        "token_s": token_s,
        "bound_s": reading_s(llm.weight_bytes()),
        "peak_gib": timing.peak_host_memory_gib(),
        "ids": llm.generate(ids, arguments.new)[0, :8].tolist(),
    }
    timing.report([{k: v for k, v in result.items() if k != "generate_s"}], result)


def reading_s(count: int) -> float:
    """Seconds in which this process sums `count` bytes of fp32, at best."""
    block = jnp.ones((min(count, 2**28) // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    timed = timing.measure(lambda: total(block).block_until_ready(), repeats=7)
    return timed.fastest_s * count / block.nbytes


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantize", choices=DTYPES)
    parser.add_argument("--kv-cache", choices=DTYPES)
    return parser.parse_args()


if __name__ == "__main__":
    main()
