"""Long audio through a full-size encoder on one device: peak memory, time, and the plain form.

    python -m benchmarks.long_encoder                    # canary's encoder, 10 minutes
    python -m benchmarks.long_encoder --minutes 2 --compare-seconds 30

The encoder is that of canary-1b-flash (32 layers of width 1024, 8 heads, feed-forward x4, 128 mel
bins, 8-fold subsampling), with random weights, in fp32. `blocked` is what the project runs: queries
in blocks of 256. `plain` scores all queries at once; both run on a shorter clip and are compared.
One line of JSON goes to the standard output, progress to the standard error.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import json
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from speechlm2_jax.layers.initialize import draw
from speechlm2_jax.layers.module import Variables, abstract, merge, split
from speechlm2_jax.perception import self_attention
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig

CANARY = FastConformerConfig(
    feat_in=128,
    n_layers=32,
    d_model=1024,
    n_heads=8,
    ff_expansion_factor=4,
    subsampling="dw_striding",
    subsampling_factor=8,
    subsampling_conv_channels=256,
    conv_kernel_size=9,
    xscaling=False,
)
FRAMES_PER_SECOND = 100
ATOL = 1e-4
LIMIT_GIB = 12.0


def log(text: str) -> None:
    """Reports progress."""
    print(text, file=sys.stderr, flush=True)


def peak_gib() -> float:
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def encode(
    config: FastConformerConfig, variables: Variables, seconds: float
) -> tuple[np.ndarray, float, float]:
    """Encodes noise of that length: (frames, seconds to compile, seconds to run)."""
    graphdef, _ = split(abstract(lambda rngs: FastConformer(config, rngs=rngs)))
    steps = round(seconds * FRAMES_PER_SECOND)
    noise = np.random.default_rng(0).normal(size=(1, steps, config.feat_in))
    features, lengths = jnp.asarray(noise, jnp.float32), jnp.asarray([steps], jnp.int32)

    def run(variables: Variables, features: Any, lengths: Any) -> Any:
        return merge(graphdef, variables)(features, lengths).frames

    began = time.perf_counter()
    compiled = jax.jit(run).lower(variables, features, lengths).compile()
    compiled_at = time.perf_counter()
    frames = np.asarray(compiled(variables, features, lengths))
    return frames, compiled_at - began, time.perf_counter() - compiled_at


def difference(config: FastConformerConfig, variables: Variables, seconds: float) -> float:
    """Largest difference between the blocked and the plain form on a clip where both fit."""
    blocked, _, _ = encode(config, variables, seconds)
    usual, self_attention.BLOCK = self_attention.BLOCK, blocked.shape[1]
    try:
        plain, _, _ = encode(config, variables, seconds)
    finally:
        self_attention.BLOCK = usual
    return float(np.abs(blocked - plain).max())


def main() -> int:
    """Runs and reports; fails where the limit or the tolerance is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--compare-seconds", type=float, default=60.0)
    parser.add_argument("--layers", type=int, default=CANARY.n_layers)
    options = parser.parse_args()
    config = FastConformerConfig(**{**vars(CANARY), "n_layers": options.layers})
    log(f"drawing weights: {config.n_layers} layers of width {config.d_model}")
    variables = draw(lambda: split(FastConformer(config, rngs=nnx.Rngs(0)))[1])
    parameters = sum(x.size for x in variables.values())
    log(f"{parameters / 1e6:.0f} M values; encoding {options.minutes:g} minutes, blocked")
    frames, compiling, running = encode(config, variables, 60 * options.minutes)
    peak = peak_gib()
    log(f"peak {peak:.2f} GiB, {running:.0f} s; comparing on {options.compare_seconds:g} s")
    result = {
        "device": jax.devices()[0].device_kind,
        "layers": config.n_layers,
        "parameters": parameters,
        "minutes": options.minutes,
        "frames": frames.shape[1],
        "finite": bool(np.isfinite(frames).all()),
        "compile_s": round(compiling, 1),
        "run_s": round(running, 1),
        "peak_gib": round(peak, 2),
        "compared_s": options.compare_seconds,
        "largest_difference": difference(config, variables, options.compare_seconds),
    }
    print(json.dumps(result))
    is_fine = result["finite"] and peak <= LIMIT_GIB and result["largest_difference"] <= ATOL
    return 0 if is_fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
