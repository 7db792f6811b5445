"""Counts XLA compilations, to tell warm-up from steady state."""

from typing import Any

import jax


class Compilations:
    """The number of compilations since `start`. JAX keeps listeners for good, so there is one."""

    count = 0
    _is_started = False

    @classmethod
    def start(cls) -> None:
        """Starts counting; further calls do nothing."""
        if not cls._is_started:
            jax.monitoring.register_event_duration_secs_listener(cls._on_event)
            cls._is_started = True

    @classmethod
    def _on_event(cls, event: str, duration_secs: float, **kwargs: Any) -> None:
        cls.count += event == "/jax/core/compile/backend_compile_duration"
