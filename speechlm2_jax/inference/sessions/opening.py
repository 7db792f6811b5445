"""Opens duplex sessions: checks that the model can stream, and plans its programs."""

from dataclasses import dataclass

import jax
from flax import nnx

from speechlm2_jax.generation.duplex import DuplexSamplingConfig
from speechlm2_jax.inference.duplex_programs import conversation_rngs, silent_codes
from speechlm2_jax.inference.sessions.conversation import SessionSettings
from speechlm2_jax.inference.sessions.duplex_session import DuplexSession
from speechlm2_jax.inference.sessions.duplex_step import (
    SessionProgram,
    SessionWeights,
    fold_codec,
    stream_plan,
)
from speechlm2_jax.inference.sessions.session_pool import DuplexSessionPool, PoolLimits
from speechlm2_jax.inference.text_stream import TextTokenizer
from speechlm2_jax.layers.module import Variables
from speechlm2_jax.layers.unstacked import Layered
from speechlm2_jax.llm import caches
from speechlm2_jax.networks.duplex import Duplex, DuplexConfig
from speechlm2_jax.perception.streaming import StreamPlan

SESSION_WINDOW_S = 120.0
"""Default of the seconds of a conversation that a frame attends to."""
SINKS = 4
"""First frames that stay in the KV caches, as in StreamingLLM."""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """The arguments of `model.session`, and the tokenizer."""

    tokenizer: TextTokenizer
    input_hz: int
    decode_audio: bool
    window_s: float
    sampling: DuplexSamplingConfig
    seed: int


def open_session(
    graphdef: nnx.GraphDef[Duplex],
    config: DuplexConfig,
    weights: tuple[Layered, Variables],
    options: SessionOptions,
) -> DuplexSession:
    """Opens a session. `weights` are those of decoding programs, and of other programs.

    Raises ValueError, naming the setting, for a model that cannot stream.
    """
    return DuplexSession(*_planned(graphdef, config, weights, options))


def open_pool(
    graphdef: nnx.GraphDef[Duplex],
    config: DuplexConfig,
    weights: tuple[Layered, Variables],
    options: SessionOptions,
    limits: PoolLimits,
) -> DuplexSessionPool:
    """Opens a pool of sessions; see `open_session`."""
    return DuplexSessionPool(*_planned(graphdef, config, weights, options), limits)


def _planned(
    graphdef: nnx.GraphDef[Duplex],
    config: DuplexConfig,
    weights: tuple[Layered, Variables],
    options: SessionOptions,
) -> tuple[SessionProgram, SessionWeights, SessionSettings]:
    """What the programs depend on, and what they are given."""
    plan = _plan(config, options)
    layered, variables = weights
    codec, folded = None, None
    if options.decode_audio:
        codec, folded = fold_codec(graphdef, config.codec, variables)
    rng = jax.random.key(options.seed) if options.sampling.is_random else None
    program = SessionProgram(
        graphdef=graphdef,
        codec=codec,
        plan=plan,
        sampling=options.sampling,
        capacity=SINKS + _window(config, options.window_s),
        sinks=SINKS,
    )
    settings = SessionSettings(
        tokenizer=options.tokenizer,
        text=config.text,
        input_hz=options.input_hz,
        model_hz=config.perception.preprocessor.sample_rate,
        frame_s=config.perception.token_equivalent_duration,
        max_frames=config.max_frames,
        silence=silent_codes(graphdef, variables),
        rngs=None if rng is None else conversation_rngs(rng, 1),
    )
    return program, SessionWeights(network=layered, codec=folded), settings


def _plan(config: DuplexConfig, options: SessionOptions) -> StreamPlan:
    """The plan of a session's perception, if every module of the model can stream."""
    try:
        plan = stream_plan(config)
    except ValueError as error:
        raise ValueError(f"this model has no sessions: model.perception.{error}") from error
    problem = caches.endless_problem(config.llm)
    if problem is not None:
        raise ValueError(
            f"this model has no sessions: model.pretrained_llm: {problem}; use an LLM with rotary "
            "positions of fixed frequencies"
        )
    decoder = config.codec.audio_decoder
    if options.decode_audio and not decoder.is_causal:
        raise ValueError(
            "this model has no sessions with audio: the decoder of model.pretrained_audio_codec, "
            f"a {decoder.TARGETS[0]}, looks ahead; use a codec with a CausalHiFiGANDecoder, or "
            "session(decode_audio=False)"
        )
    return plan


def _window(config: DuplexConfig, window_s: float) -> int:
    """Frames of the window: no more than the frames of a conversation, if these are limited."""
    frame_s = config.perception.token_equivalent_duration
    frames = int(window_s / frame_s + 1e-6)
    if frames < 1:
        raise ValueError(f"session_window_s={window_s} must be at least a frame ({frame_s} s)")
    return min(frames, config.max_frames or frames)
