"""What inference needs of a SALM, as one value: network, weights, tokenizer and token ids."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.layers.module import Variables
from speechlm2_jax.layers.unstacked import Layered
from speechlm2_jax.networks.salm import Salm
from speechlm2_jax.sharding import Sharding


@dataclass(frozen=True, kw_only=True, eq=False)
class Engine:
    """A SALM that is ready for inference. Attributes have the names that they have on SALM."""

    graphdef: nnx.GraphDef[Salm]
    """The network without weights."""
    variables: Variables | Mapping[str, jax.ShapeDtypeStruct]
    """Path -> array. Shapes and dtypes are enough if programs are only compiled."""
    decoding_variables: Layered
    """The variables for `decode`: on a CPU with arrays of each layer (`LayerViews`)."""
    placement: Sharding | None
    """How arrays are sharded over the devices; None on one device."""
    tokenizer: Tokenizer
    prompt_formatter: PromptFormatter
    frame_count: FrameCount
    """Samples of a clip -> frames that the LLM sees."""
    sampling_rate: int
    audio_locator_tag: str
    """The text of one audio placeholder."""
    audio_locator_tag_id: int
    text_bos_id: int | None
    text_eos_id: int | None
    text_pad_id: int
    end_ids: tuple[int, ...]
    """All tokens that end a response by default."""
    generation_defaults: Mapping[str, object]
    """The LLM's generation_config.json, or nothing."""
    text_vocab_size: int
    nemo_exact: bool
    """Whether results that depend on NeMo's own padding are reproduced."""
    transcripts: Callable[[Sequence[np.ndarray]], list[np.ndarray]] | None = None
    """Clips (float32 [S]) -> the token ids [L] that follow the frames of each; None: none do."""
    open_aligner: Callable[[], Aligner | None] = lambda: None
    """Opens what finds the times of words; None: nothing does."""

    @property
    def network(
        self,
    ) -> tuple[nnx.GraphDef[Salm], Variables | Mapping[str, jax.ShapeDtypeStruct]]:
        """(graphdef, variables), the first two arguments of every compiled program."""
        return self.graphdef, self.variables

    @property
    def decoding_network(self) -> tuple[nnx.GraphDef[Salm], Layered]:
        """(graphdef, variables), the first two arguments of programs that decode in a loop."""
        return self.graphdef, self.decoding_variables
