"""The transcripts that a SALMWithAsrDecoder reads after each clip: audio -> labels -> token ids."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax import sharding
from speechlm2_jax.asr.greedy import DecodingLimits, Hypotheses, decode_greedily
from speechlm2_jax.asr.transducer import TransducerNetwork
from speechlm2_jax.batches import SalmExample, follow_placeholders
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.transcribe import transcribe
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.networks.salm import Salm
from speechlm2_jax.sharding import Sharding

BEFORE, AFTER = ">>", "<<"
"""What NeMo writes around a transcript."""


@dataclass(frozen=True, kw_only=True)
class TranscriptFormat:
    """Turns the labels of an ASR model into the token ids of the LLM that follow the clip."""

    to_text: Callable[[list[int]], str]
    """Labels of a clip -> its transcript."""
    tokenizer: Tokenizer
    """The LLM's."""
    limits: DecodingLimits

    def tokens_of(self, text: str) -> np.ndarray:
        """Token ids [L] of a transcript; of an empty one, those of the marks around it."""
        written = f"{BEFORE} {text} {AFTER}" if text else f"{BEFORE} {AFTER}"
        return np.asarray(self.tokenizer.text_to_ids(written), np.int32)


@dataclass(frozen=True, kw_only=True)
class ClipTranscriber:
    """Transcribes clips with the ASR model inside a network, for prompts."""

    graphdef: nnx.GraphDef[Salm]
    variables: Variables | Mapping[str, jax.ShapeDtypeStruct]
    placement: Sharding | None
    format: TranscriptFormat

    def texts(self, clips: Sequence[np.ndarray]) -> list[str]:
        """The transcript of each clip (float32 [S])."""
        return [str(text) for text in transcribe(clips, self._decode, self.format.to_text)]

    def tokens(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The token ids that follow each clip."""
        return [self.format.tokens_of(text) for text in self.texts(clips)]

    def _decode(self, audio: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        found = _hypotheses(
            self.graphdef,
            self.variables,
            jnp.asarray(audio),
            jnp.asarray(lengths, jnp.int32),
            self.placement,
            **self.format.limits,
        )
        pairs = zip(np.asarray(found.labels), np.asarray(found.lengths), strict=True)
        return [labels[:count].tolist() for labels, count in pairs]


def with_transcripts(engine: Engine, examples: Sequence[SalmExample]) -> list[SalmExample]:
    """Puts the transcript of each clip after its placeholder, if the model reads transcripts.

    A clip that is too short for one frame is left out, and so is its transcript.
    """
    if engine.transcripts is None:
        return list(examples)
    is_read = [[engine.frame_count(len(clip)) > 0 for clip in e.audio] for e in examples]
    clips = [c for e, own in zip(examples, is_read, strict=True) for c in compress(e.audio, own)]
    tokens = iter(engine.transcripts(clips))
    nothing = np.zeros(0, np.int32)
    completed: list[SalmExample] = []
    for example, read in zip(examples, is_read, strict=True):
        own = [next(tokens) if has_frames else nothing for has_frames in read]
        ids = follow_placeholders(example.tokens, engine.audio_locator_tag_id, own)
        places = np.flatnonzero(example.tokens == engine.audio_locator_tag_id) + 1
        mask = np.insert(example.loss_mask, np.repeat(places, [len(text) for text in own]), False)
        completed.append(replace(example, tokens=ids, loss_mask=mask))
    return completed


@partial(jax.jit, static_argnames=("graphdef", "placement", "max_symbols", "jumps_when_full"))
def _hypotheses(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    placement: Sharding | None,
    max_symbols: int,
    jumps_when_full: bool,
) -> Hypotheses:
    network: Salm = merge(graphdef, variables)
    perception = network.perception
    assert isinstance(perception, TransducerNetwork)
    with sharding.use(placement):
        encoded = perception.encoder_output(audio, lengths, dtype=network.dtype)
        return decode_greedily(
            perception,
            encoded.frames,
            encoded.lengths,
            max_symbols=max_symbols,
            jumps_when_full=jumps_when_full,
        )
