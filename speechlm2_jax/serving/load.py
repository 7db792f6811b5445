"""Loads the model that is served."""

from typing import TYPE_CHECKING

from speechlm2_jax.serving.options import ServeOptions
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.inference.engine import Engine


def load_engine(options: ServeOptions) -> "Engine":
    """Loads a SALM for serving. Raises SettingsError for a model that cannot be loaded."""
    from speechlm2_jax.compilation_cache import keep_compiled_programs
    from speechlm2_jax.models import SALM

    keep_compiled_programs("auto")
    model = SALM.from_pretrained(
        options.model,
        dtype=options.dtype,
        strategy=options.strategy,
        quantize=options.quantize,
        kv_cache_dtype=options.kv_cache_dtype,
    )
    engine = model.eval().engine()
    if engine.transcripts is not None:
        raise SettingsError(
            f"{options.model}: a SALM with an ASR decoder is not supported by serve"
        )
    return engine
