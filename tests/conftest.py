"""Eight CPU devices, strict ranks, the longest files first; nothing is downloaded."""

import gc
import os
import sys
from pathlib import Path

if sys.dont_write_bytecode:
    # Hundreds of packages would be compiled anew by every worker and every process of a test,
    # 5 s each. They are kept here and not beside the sources, as the user has asked.
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    del os.environ["PYTHONDONTWRITEBYTECODE"]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
from tests import quick_compilation  # noqa: E402

FLAGS = f"--xla_force_host_platform_device_count=8 {quick_compilation.FLAGS}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.slow_variants import mark_slow  # noqa: E402

gc.set_threshold(100_000, 50, 50)  # traces are many small objects, and hardly one is garbage

# compilation makes first examples slow; the same examples on every machine
settings.register_profile("project", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("project")

LONGEST = (
    "training/test_processes.py",
    "parity/test_duplex.py",
    "speech_decoder/test_decoder.py",
    "perception/test_fastconformer.py",
    "parity/test_salm.py",
    "test_duplex_library.py",
    "multidevice/test_salm_meshes.py",
    "speech_decoder/test_decoder_mesh.py",
    "perception/test_audio_perception.py",
    "pretrained/test_streamed_loading.py",
    "models/test_duplex_model.py",
)
"""Few tests of many seconds each: last, they would leave one of two workers without work."""


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` looks at the marks
def pytest_collection_modifyitems(items):
    """Marks the slow variants, and brings the longest files to the front, in the order above."""
    mark_slow(items)
    places = {name: place for place, name in enumerate(LONGEST)}

    def place(item):
        return places.get("/".join(item.path.parts[-2:]), len(places))

    items.sort(key=place)
