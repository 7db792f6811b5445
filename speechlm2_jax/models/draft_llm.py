"""DraftLLM: a causal LLM alone, which proposes draft tokens to a SALM."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from speechlm2_jax.conversion import hf_config, mapping
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.readers import TensorSource
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.inference import stages
from speechlm2_jax.inference.draft_models import DraftModel, decoder_graphdef
from speechlm2_jax.layers.module import abstract, describe
from speechlm2_jax.layers.unstacked import LayerViews
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.models.salm import SALM
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.llm_files import llm_config, llm_weights, tokenizer_folder
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.settings import SettingsError

KEY = "assistant_model"


class DraftLLM:
    """A causal LLM that proposes draft tokens (`assistant_model` of `SALM.generate`).

    It reads the text of the prompts, and no audio. It needs the SALM's tokenizer.
    """

    def __init__(
        self, config: DecoderConfig, weights: TensorSource, tokenizer: Tokenizer, dtype: str
    ) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self._graphdef = decoder_graphdef(config)
        infos = describe(abstract(lambda rngs: Decoder(config, rngs=rngs)))
        loaded = mapping.load(weights, decoder_table(config), infos)
        kept = jnp.dtype(dtype)
        cast = {path: x.astype(infos[path].computed_in(kept)) for path, x in loaded.items()}
        self.variables = stages.on_default_device(cast)
        self._layer_views = LayerViews("")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, dtype: str = "float32") -> "DraftLLM":
        """Opens a Hugging Face directory, a GGUF file, or a hub name.

        Raises SettingsError for what is no LLM, ConversionError for weights that do not fit.
        """
        path = Location().find(str(name_or_path), key=KEY)
        kind = registry.identify(path)
        if kind is None or not kind.is_llm:
            found = f"{path} is {kind.what}" if kind is not None else f"{path} is unknown"
            raise SettingsError(f"{KEY}: {found}; name a causal LLM")
        config = hf_config.decoder_config(llm_config(path, key=KEY))
        tokenizer = Tokenizer(tokenizer_folder(path, key=KEY))
        return cls(config, llm_weights(path), tokenizer, dtype)

    @property
    def device(self) -> jax.Device:
        """The device of the weights."""
        return stages.device_of(self.variables)

    def as_draft_model(self) -> DraftModel:
        """The LLM as `SALM.generate` uses it."""
        return DraftModel(
            graphdef=self._graphdef,
            variables=self._layer_views(self._graphdef, self.variables),
            tokenizer=self.tokenizer,
            dtype=self.dtype,
        )


def open_assistant(name_or_path: str | Path, dtype: str) -> "SALM | DraftLLM":
    """Opens the SALM or LLM that `assistant_model` names; the latest ones are kept open."""
    path = Location().find(str(name_or_path), key=KEY)
    return _open(path, dtype)


@lru_cache(maxsize=2)
def _open(path: Path, dtype: str) -> Any:
    kind = registry.identify(path)
    if kind is registry.SALM:
        return SALM.from_pretrained(path, dtype=dtype)
    return DraftLLM.from_pretrained(path, dtype=dtype)
