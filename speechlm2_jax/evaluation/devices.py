"""The device of the `device` argument."""

import jax

from speechlm2_jax.settings import SettingsError

_PLATFORMS = {"cuda": "gpu", "gpu": "gpu", "rocm": "gpu", "tpu": "tpu", "cpu": "cpu"}


def choose_device(name: str) -> jax.Device:
    """Makes a device the default: auto, cpu, gpu (or cuda), tpu, with an index as in `gpu:1`.

    Raises SettingsError if it does not exist, listing what JAX sees; there is no fallback.
    """
    kind, _, index = name.lower().partition(":")
    if kind != "auto" and kind not in _PLATFORMS or (index and not index.isdigit()):
        raise SettingsError(f"device: {name!r} is unknown; use auto, cpu, gpu, cuda or tpu")
    try:
        devices = jax.devices(None if kind == "auto" else _PLATFORMS[kind])
    except RuntimeError:
        devices = []
    number = int(index or 0)
    if number >= len(devices):
        seen = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise SettingsError(f"device: {name} not found (JAX sees {seen}); use device=auto")
    jax.config.update("jax_default_device", devices[number])
    return devices[number]
