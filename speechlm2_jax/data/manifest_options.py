"""How the rows of one manifest become conversations, whatever its format."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from speechlm2_jax.data.conversations import (
    DEFAULT_LOCATOR_TAG,
    AudioClip,
    AudioTurn,
    Conversation,
    TextTurn,
)
from speechlm2_jax.data.manifest_values import text


@dataclass(frozen=True, kw_only=True)
class ManifestOptions:
    """How the lines of one manifest become conversations."""

    locator_tag: str = DEFAULT_LOCATOR_TAG
    token_equivalent_duration_s: float | None = None
    tags: Mapping[str, object] | None = None
    """Fields that replace the manifest's own."""
    text_field: str = "text"
    channel: int | None = None
    """Channel of recordings with several, where the manifest does not choose; None: the mean."""

    def all_fields(self, own: Mapping[str, object]) -> dict[str, Any]:
        """The fields of a conversation whose row has some of its own."""
        return {**own, **(self.tags or {})}


def conversation_of_recording(
    name: str,
    clip: AudioClip,
    response: object,
    own: Mapping[str, object],
    options: ManifestOptions,
    *,
    where: str,
) -> Conversation:
    """A recording as a conversation: context if any, the audio, and its text as the response.

    Raises SettingsError if context, system prompt or response is not text.
    """
    fields = options.all_fields(own)
    turns: list[TextTurn | AudioTurn] = []
    for key, role in (("system_prompt", "system"), ("context", "user")):
        if fields.get(key) is not None:
            turns.append(TextTurn(role=role, text=text(fields[key], key)))
    turns.append(AudioTurn(role="user", clip=clip, locator_tag=options.locator_tag))
    if response is not None:
        turns.append(TextTurn(role="assistant", text=text(response, options.text_field)))
    return Conversation(
        id=name,
        turns=tuple(turns),
        token_equivalent_duration_s=options.token_equivalent_duration_s,
        fields=fields,
        where=where,
    )
