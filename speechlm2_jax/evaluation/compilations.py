"""What XLA compiles meanwhile, to tell warm-up from work."""

from typing import Any

import jax


class Compilations:
    """A count of compilations. JAX keeps listeners for good: there is one."""

    count = 0
    _is_listening = False

    @classmethod
    def listen(cls) -> None:
        """Counts from now on."""
        if not cls._is_listening:
            jax.monitoring.register_event_duration_secs_listener(cls._heard)
            cls._is_listening = True

    @classmethod
    def _heard(cls, event: str, duration_secs: float, **kwargs: Any) -> None:
        cls.count += event == "/jax/core/compile/backend_compile_duration"
