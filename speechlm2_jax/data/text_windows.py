"""Long texts without a prompt as several examples, of so many tokens each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from speechlm2_jax.data.conversations import Conversation, TextTurn
from speechlm2_jax.data.tokenizer import Tokenizer

_TEXTS_AT_ONCE = 1024


def in_windows(
    conversations: Sequence[Conversation], tokens: int, tokenizer: Tokenizer
) -> list[Conversation]:
    """Cuts plain texts (`txt`, `txt_jsonl`) into windows of `tokens`; others stay as they are.

    As in NeMo, a window is the text of its tokens, which may have other tokens at its ends.
    """
    made: list[Conversation] = []
    for start in range(0, len(conversations), _TEXTS_AT_ONCE):
        chunk = conversations[start : start + _TEXTS_AT_ONCE]
        texts = [text for one in chunk if (text := _plain(one)) is not None]
        ids = iter(tokenizer.texts_to_ids(texts) if texts else ())
        for one in chunk:
            made += [one] if _plain(one) is None else _windows(one, next(ids), tokens, tokenizer)
    return made


def _plain(conversation: Conversation) -> str | None:
    """The text of a conversation that is nothing but a response."""
    return conversation.response if len(conversation.turns) == 1 else None


def _windows(
    conversation: Conversation, ids: Sequence[int], tokens: int, tokenizer: Tokenizer
) -> Iterator[Conversation]:
    if len(ids) <= tokens:
        yield conversation
        return
    for number, start in enumerate(range(0, len(ids), tokens), start=1):
        text = tokenizer.ids_to_text(ids[start : start + tokens], False)
        turn = TextTurn(role=conversation.turns[0].role, text=text)
        yield replace(conversation, id=f"{conversation.id} window {number}", turns=(turn,))
