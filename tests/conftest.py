"""Eight CPU devices and strict ranks for every test; nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# tests compile far more than they compute: without LLVM's optimisations and XLA's fusion emitters
# they take less than half the time
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

from hypothesis import settings  # noqa: E402

# compilation makes first examples slow; the same examples on every machine
settings.register_profile("project", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("project")
