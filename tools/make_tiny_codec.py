"""Makes configs/parts/tiny_codec.nemo: a causal FSQ codec of 80 ms frames, fitted in closed form.

    python -m tools.make_tiny_codec

It is fitted to one voice, the agent of corpus/dialogs, and its sentences. Its encoder projects each
frame of 1,280 samples onto the principal components of the agent's frames, the quantizer rounds,
and its decoder is the least-squares map back. Both are written as NeMo's causal HiFi-GAN, whose
layers can be linear: a bias lifts every signal above zero, where a leaky ReLU changes nothing; of
the taps of a convolution that changes the rate only those of the frame itself are used; residual
branches are zero. So any tool for codecs can read, decode and stream it, and nobody has to train
it.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import soundfile

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.codec import ASKED_BY_NEMO, codec_table
from speechlm2_jax.conversion.writers import write_nemo
from speechlm2_jax.models import AudioCodec

ROOT = Path(__file__).parents[1]
AGENT = ROOT / "corpus" / "dialogs" / "audio" / "agent.ogg"
TARGET = ROOT / "configs" / "parts" / "tiny_codec.nemo"
RATE_HZ, SLOW, FAST = 16_000, 32, 40
FRAME = SLOW * FAST
CODEBOOKS, LEVELS = 20, (8, 6, 4, 3)
WIDTH = CODEBOOKS * len(LEVELS)
SPREAD = 0.45
"""Standard deviation of a component before the quantizer's tanh."""
RIDGE = 1e-3
LIFT, CODE_LIFT = 2.0, 16.0
"""More than any sample, or any component before the quantizer, lies below zero."""
TERMS = 3
"""Of numbers in bf16 that together are as exact as one in fp32."""
MODULES = "nemo.collections.tts.modules.audio_codec_modules"
PLAIN = {
    "activation": "lrelu",
    "in_kernel_size": 1,
    "out_kernel_size": 1,
    "resblock_kernel_sizes": [1],
    "resblock_dilation_sizes": [1],
    "pad_mode": "zeros",
}
CONFIG: dict[str, Any] = {
    "target": "nemo.collections.tts.models.audio_codec.AudioCodecModel",
    "sample_rate": RATE_HZ,
    "samples_per_frame": FRAME,
    "audio_encoder": {
        "_target_": f"{MODULES}.CausalHiFiGANEncoder",
        "down_sample_rates": [FAST, SLOW],
        "encoded_dim": WIDTH,
        "base_channels": WIDTH // 4,
        **PLAIN,
    },
    "audio_decoder": {
        "_target_": f"{MODULES}.CausalHiFiGANDecoder",
        "up_sample_rates": [SLOW, FAST],
        "input_dim": WIDTH,
        "base_channels": WIDTH + 4,
        "output_activation": "clamp",
        "n_groups_equal_to_out_channels": False,
        **PLAIN,
    },
    "vector_quantizer": {
        "_target_": f"{MODULES}.GroupFiniteScalarQuantizer",
        "num_groups": CODEBOOKS,
        "num_levels_per_group": list(LEVELS),
    },
    **ASKED_BY_NEMO,
}
Weights = dict[str, np.ndarray]


def agent_frames() -> np.ndarray:
    """All frames [n, FRAME] of the agent's recordings."""
    wave, _ = soundfile.read(AGENT, dtype="float32")
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    return frames[np.abs(frames).max(axis=1) > 1e-3]


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest values that bf16 can hold."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def quantized(x: np.ndarray) -> np.ndarray:
    """What the quantizer makes of components [n, WIDTH]."""
    levels = np.tile(np.asarray(LEVELS, np.float64), CODEBOOKS)
    half, odd = (levels - 1) / 2 * (1 - 1e-3), np.where(levels % 2 == 0, 0.5, 0.0)
    return np.round(half * np.tanh(x + np.tan(odd / half)) - odd) / (levels // 2)


def fit(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(projection [WIDTH, FRAME], synthesis [WIDTH, FRAME]) of these frames.

    Components with much energy get the dimensions with many levels.
    """
    basis = np.linalg.eigh(frames.T @ frames)[1].T[::-1][:WIDTH]
    basis = basis.reshape(len(LEVELS), CODEBOOKS, FRAME).swapaxes(0, 1).reshape(WIDTH, FRAME)
    projection = SPREAD * basis / np.std(frames @ basis.T, axis=0)[:, None]
    codes = quantized(frames @ projection.T)
    gram = codes.T @ codes
    ridge = RIDGE * np.trace(gram) / WIDTH * np.eye(WIDTH)
    return projection, np.linalg.solve(gram + ridge, codes.T @ frames)


def kernels(projection: np.ndarray, synthesis: np.ndarray) -> dict[str, Weights]:
    """Kernels, as torch has them, and biases of the convolutions that are not zero."""
    projection, synthesis = rounded(projection), rounded(synthesis)
    quarter, half, more = WIDTH // 4, WIDTH // 2, WIDTH + 4
    made: dict[str, Weights] = {}

    def convolution(name: str, shape: tuple[int, int, int], outputs: int) -> Weights:
        made[name] = {"kernel": np.zeros(shape), "bias": np.zeros(outputs)}
        return made[name]

    first = convolution("encoder.input", (quarter, 1, 1), quarter)
    first["kernel"][0], first["bias"][0] = 1.0, LIFT
    fast = convolution("encoder.stages.0.down", (half, quarter, 2 * FAST), half)
    fast["kernel"][range(FAST), 0, range(FAST, 2 * FAST)] = 1.0
    slow = convolution("encoder.stages.1.down", (WIDTH, half, 2 * SLOW), WIDTH)
    slow["kernel"][..., SLOW:] = projection.reshape(WIDTH, SLOW, FAST).swapaxes(1, 2)
    slow["bias"][:] = CODE_LIFT - LIFT * projection.sum(axis=1)
    last = convolution("encoder.output", (WIDTH, WIDTH, 1), WIDTH)
    last["kernel"][..., 0], last["bias"][:] = np.eye(WIDTH), -CODE_LIFT

    first = convolution("decoder.input", (more, WIDTH, 1), more)
    first["kernel"][:WIDTH, :, 0], first["bias"][:WIDTH] = np.eye(WIDTH), LIFT
    first["bias"][WIDTH : WIDTH + TERMS] = 1.0  # take the lift back, sample by sample
    slow = convolution("decoder.stages.0.up", (more, more // 2, 2 * SLOW), more // 2)
    rows, rest = list(synthesis), -LIFT * synthesis.sum(axis=0)
    for _ in range(TERMS):
        rows.append(rounded(rest))
        rest = rest - rows[-1]
    for row, values in enumerate(rows):
        slow["kernel"][row, :FAST, :SLOW] = values.reshape(SLOW, FAST).T
    slow["bias"][:FAST] = LIFT
    fast = convolution("decoder.stages.1.up", (more // 2, more // 4, 2 * FAST), more // 4)
    fast["kernel"][range(FAST), 0, range(FAST)] = 1.0
    last = convolution("decoder.output", (1, more // 4, 1), 1)
    last["kernel"][0, 0], last["bias"][:] = 1.0, -LIFT
    return made


def variables(codec: AudioCodec, made: dict[str, Weights]) -> Weights:
    """All variables of the codec: kernels as gain and direction, residual branches of zero."""
    values: Weights = {}
    for path, info in codec.infos.items():
        layer, _, name = path.removesuffix(".weight.gain").rpartition(".")
        if name in ("levels", "bases"):
            row = LEVELS if name == "levels" else np.cumprod((1, *LEVELS[:-1]))
            values[path] = np.broadcast_to(np.asarray(row, info.dtype), info.shape)
        elif name == "bias":
            values[path] = made[layer]["bias"] if layer in made else np.zeros(info.shape)
        elif name == "direction":
            layer = layer.removesuffix(".weight")
            kernel = made[layer]["kernel"] if layer in made else np.zeros(info.shape)
            is_zero = np.logical_not(np.any(kernel, axis=(1, 2), keepdims=True))
            direction = np.where(is_zero, 1.0, kernel).astype(ml_dtypes.bfloat16)
            length = np.sqrt(np.square(direction.astype(np.float64)).sum(axis=(1, 2)))
            values[path] = direction
            values[path.replace("direction", "gain")] = np.where(is_zero[:, 0, 0], 0.0, length)
    return {path: _stored(path, values[path]) for path in codec.infos}


def _stored(path: str, value: np.ndarray) -> np.ndarray:
    """Directions in bf16, which halves the file; the rest as it is computed with."""
    if path.endswith(("direction", "levels", "bases")):
        return np.ascontiguousarray(value)
    return value.astype(np.float32)


def main() -> None:
    """Fits, writes, and prints how well the recordings come back."""
    codec = AudioCodec(CONFIG)
    values = variables(codec, kernels(*fit(agent_frames().astype(np.float64))))
    write_nemo(
        TARGET, CONFIG, mapping.export(values, codec_table(codec.config)), {}, compressed=True
    )
    recorded = agent_frames().reshape(1, -1)
    codec = AudioCodec.from_pretrained(TARGET)
    codes, frames = codec.encode(recorded, [recorded.shape[1]])
    decoded = np.asarray(codec.decode(codes, frames).audio)
    snr_db = 10 * np.log10(np.square(recorded).sum() / np.square(recorded - decoded).sum())
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1e6:.2f} MB, {snr_db:.1f} dB")


if __name__ == "__main__":
    main()
