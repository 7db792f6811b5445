"""JAX's persistent compilation cache: compiled programs are kept on disk between processes."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep_compiled_programs(folder: str | None) -> None:
    """Turns the persistent compilation cache on.

    Args:
        folder: where compiled programs are kept. "auto" is `speechlm2_jax/compiled` in the user's
            cache folder; None leaves the cache off.

    Does nothing where JAX_COMPILATION_CACHE_DIR has set a folder already.
    """
    if folder is None or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    if folder == "auto":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")  # empty is unset
        folder = str(cache / "speechlm2_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # programs compiled before this ran without a cache
