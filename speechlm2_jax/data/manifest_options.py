"""How the rows of one manifest become conversations, whatever its format."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speechlm2_jax.data.conversations import (
    DEFAULT_LOCATOR_TAG,
    AudioClip,
    AudioTurn,
    Conversation,
    TextTurn,
)
from speechlm2_jax.data.manifest_values import missing_key, text
from speechlm2_jax.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class SpeakerRoles:
    """Whose the supervisions of a dialog are, and how its texts are cleaned."""

    users: Sequence[str] = ("user", "User")
    """Speakers whose recordings are the user's turns, spelt exactly so."""
    assistants: Sequence[str] = ("assistant", "Assistant", "agent", "Agent")
    """Speakers whose texts are the responses."""
    strips_timestamps: bool = True
    """Removes `<|12|>`, and makes every run of white space one space."""


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
    with_question: bool = False
    """Whether fields `question` and "answer" are the user's text and the response, as in NeMo's
    `sqa_as_conversation`."""
    roles: SpeakerRoles | None = None
    """Of cuts that are dialogs, a supervision for each turn; None: one recording and its text."""
    question_role: str = "user"
    """Of a question before a pair of texts: `system` in NeMo's llama2, where it is no user's."""
    seed: int = 0
    """Of what is drawn, as the questions of pairs of texts."""
    skip_missing: bool = False
    """Of tars: leaves out members without a row, and rows without a member."""

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

    Raises SettingsError if context, system prompt or response is not text, and with
    `with_question` if the question or its response is missing.
    """
    fields = options.all_fields(own)
    turns: list[TextTurn | AudioTurn] = [*opening_turns(fields)]
    if options.with_question:
        turns.append(TextTurn(role="user", text=_required(fields, "question")))
        response = _required(fields, "answer")
    turns.append(AudioTurn(role="user", clip=clip, locator_tag=options.locator_tag))
    if response is not None:
        turns.append(TextTurn(role="assistant", text=text(response, options.text_field)))
    return Conversation(
        id=name,
        turns=tuple(turns),
        token_equivalent_duration_s=options.token_equivalent_duration_s,
        fields=fields,
        where=where,
        is_dialog=False,
    )


def opening_turns(fields: Mapping[str, object]) -> Iterator[TextTurn]:
    """The turns that open a dialog by its fields: `system_prompt`, and `context` of the user."""
    for key, role in (("system_prompt", "system"), ("context", "user")):
        if fields.get(key) is not None:
            yield TextTurn(role=role, text=text(fields[key], key))


def _required(fields: Mapping[str, object], key: str) -> str:
    if fields.get(key) is None:
        raise SettingsError(missing_key(fields, key))
    return text(fields[key], key)
