"""Times the mel front end and the speech encoder of a named shape, each alone.

    python -m benchmarks.perception --preset small --batch 8 --seconds 10

Random weights and noise. `mel` is waveforms to features, `encoder` features to frames, `gradient`
the encoder's forward and backward pass, with no layer computed again. Needs the JAX stack only.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from benchmarks.presets import PRESETS, Preset
from speechlm2_jax.compilation_cache import keep_compiled_programs
from speechlm2_jax.layers.initialize import draw
from speechlm2_jax.layers.module import Variables, abstract, merge, split
from speechlm2_jax.perception.frames import Frames
from speechlm2_jax.perception.perception import AudioPerception
from speechlm2_jax.training.run import huge_pages


class PerceptionWork:
    """A front end and an encoder with random weights, and what is timed on them."""

    def __init__(self, preset: Preset, batch: int, seconds: float, dtype: str):
        self.config, self.dtype = preset.perception, jnp.dtype(dtype)
        make = partial(AudioPerception, self.config)
        self.graphdef = split(abstract(lambda rngs: make(rngs=rngs)))[0]
        self.variables = draw(lambda: split(make(rngs=nnx.Rngs(0)))[1])
        samples = round(seconds * self.config.preprocessor.sample_rate)
        random = np.random.default_rng(0)
        self.audio = jnp.asarray(random.uniform(-0.3, 0.3, (batch, samples)), jnp.float32)
        self.lengths = jnp.full(batch, samples, jnp.int32)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """By name, calls that wait for their results."""
        mel = jax.jit(self._mel)(self.variables, self.audio, self.lengths)
        arguments = {
            "mel": (self._mel, (self.audio, self.lengths)),
            "encoder": (self._encode, (mel,)),
            "gradient": (jax.grad(self._energy, allow_int=True), (mel,)),
        }
        return {
            name: _waiting(jax.jit(function), self.variables, *given)
            for name, (function, given) in arguments.items()
        }

    def _mel(self, variables: Variables, audio: Any, lengths: Any) -> Frames:
        return merge(self.graphdef, variables).log_mel(audio, lengths)

    def _encode(self, variables: Variables, mel: Frames) -> Any:
        encoder = merge(self.graphdef, variables).encoder
        return encoder(mel.frames.astype(self.dtype), mel.lengths).frames

    def _energy(self, variables: Variables, mel: Frames) -> jax.Array:
        return jnp.sum(jnp.square(self._encode(variables, mel).astype(jnp.float32)))


def _waiting(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*arguments))


def main() -> None:
    """Times each part; prints the table and the line of JSON."""
    arguments = _arguments()
    keep_compiled_programs("auto")
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    work = PerceptionWork(PRESETS[arguments.preset], arguments.batch, arguments.seconds, dtype)
    result: dict[str, Any] = {**vars(arguments), "dtype": dtype, "machine": timing.machine()}
    rows = []
    for name, call in work.calls().items():
        timing.log(f"{name} ...")
        first_s, _ = timing.timed(call)
        taken = timing.measure(call, repeats=arguments.repeats)
        result |= {f"{name}_s": taken.as_list(), f"{name}_processor_s": taken.processor_s}
        rows.append(
            {
                "what": name,
                "time (fastest to slowest)": str(taken),
                "processor, s": taken.processor_s,
                "first call, s": first_s,
                "audio s/s": arguments.batch * arguments.seconds / taken.median_s,
            }
        )
    result["peak_host_memory_gib"] = timing.peak_host_memory_gib()
    result["peak_memory_gib"] = timing.peak_device_memory_gib()
    timing.report(rows, result)


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny")
    add("--batch", type=int, default=8)
    add("--seconds", type=float, default=10.0, help="of each clip")
    add("--repeats", type=int, default=5)
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()
    main()
