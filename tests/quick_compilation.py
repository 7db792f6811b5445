"""Options with which XLA compiles quickly: tests compile far more than they compute.

Without LLVM's optimisations and XLA's fusion emitters they take less than half the time.
"""

from importlib import metadata

QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if metadata.version("jaxlib").startswith("0.10."):
    # later ones always use the emitters, and end a process that names the flag
    QUICK["xla_cpu_use_fusion_emitters"] = False
FLAGS = " ".join(f"--{name}={value}".lower() for name, value in QUICK.items()) + (
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
