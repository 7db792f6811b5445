"""LLMs of real size go through the whole loader by names and shapes alone: no weight exists."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.coverage import coverage
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.readers import LazySource, TensorInfo
from speechlm2_jax.layers.module import abstract, describe
from speechlm2_jax.llm.decoder import Decoder
from tests.llm.full_size import CONFIGS, PARAMETERS


def stored_tensors(config: dict[str, Any]) -> dict[str, TensorInfo]:
    """Names and shapes of the file that transformers writes for a config."""
    import torch
    import transformers

    with torch.device("meta"):
        options = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(options)
    dtype = np.dtype(ml_dtypes.bfloat16)
    names = {name: TensorInfo(tuple(x.shape), dtype) for name, x in model.state_dict().items()}
    if options.tie_word_embeddings:
        del names["lm_head.weight"]
    return names


def without_values(infos: dict[str, TensorInfo]) -> LazySource:
    def fetch(name: str, index: Any) -> np.ndarray:
        raise AssertionError(f"{name} was read")

    return LazySource(infos, fetch)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_of_a_full_size_llm_are_those_of_transformers(name):
    stored = stored_tensors(CONFIGS[name])
    config = decoder_config(CONFIGS[name])
    table = decoder_table(config)
    infos = describe(abstract(lambda rngs: Decoder(config, rngs=rngs)))
    source = without_values(stored)
    loaded = mapping.load(
        source,
        table,
        infos,
        lambda path, shape, dtype, read: jax.ShapeDtypeStruct(shape, dtype),
    )
    assert {path: x.shape for path, x in loaded.items()} == {p: i.shape for p, i in infos.items()}
    assert sum(int(np.prod(x.shape)) for x in loaded.values()) == PARAMETERS[name]
    assert coverage(source, table, infos).lines() == [
        f"loaded: {len(stored)} of {len(stored)} tensors"
    ]
    written = mapping.export_source(loaded, table)
    assert dict(written.infos) == stored
    named = {s.name for s in mapping.names(table, infos) if s.is_parameter}
    assert named == stored.keys()
