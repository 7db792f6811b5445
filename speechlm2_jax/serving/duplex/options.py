"""The settings of a server of conversations."""

from dataclasses import dataclass

from speechlm2_jax.serving.options import MIB, ServerOptions


@dataclass(frozen=True, kw_only=True)
class ConversationOptions(ServerOptions):
    """What `talk` takes; times in seconds."""

    port: int = 8998
    max_body_bytes: int = 1 << 16
    drain_timeout_s: float = 10.0
    """After SIGTERM, for conversations under way."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header besides localhost, addresses and `host`."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of pages besides those of this server."""
    max_sessions: int = 4
    """Conversations at once; further ones are closed with 1013."""
    max_load: float = 0.875
    """No conversation begins while a step takes a larger fraction of a chunk's duration."""
    max_session_s: float = 1800.0
    """A longer conversation is closed with 1008."""
    idle_timeout_s: float = 60.0
    """Without any audio of the user; then the conversation is closed with 1008."""
    max_message_bytes: int = MIB
    """A larger message is closed with 1009."""
    max_backlog_s: float = 2.0
    """Audio of the user that waits for the device."""
    max_unsent_s: float = 5.0
    """Audio of the agent that waits for a client that does not read."""
    stall_s: float = 0.4
    """Without audio of the user, after which silence stands in for it."""
    session_window_s: float = 120.0
    """Seconds that a frame attends to."""
    temperature: float = 0.0
    """Of both channels; 0: greedy."""
    seed: int = 0
