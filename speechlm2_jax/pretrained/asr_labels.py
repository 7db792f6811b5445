"""Labels of an ASR model -> text: SentencePiece, word pieces, or plain characters."""

from collections.abc import Callable, Sequence

from speechlm2_jax.asr.punctuation import attach_punctuation, punctuation_marks
from speechlm2_jax.conversion.readers.nemo import NemoArchive
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.pretrained.locate import nemo_tokenizer
from speechlm2_jax.settings import SettingsError

CHARACTER_MODELS = ("EncDecCTCModel", "EncDecRNNTModel", "EncDecHybridRNNTCTCModel")
"""NeMo's classes without a tokenizer. Their config lists the labels, which are characters."""
CONTINUATION = "##"
"""Prefix of a word piece that continues the word before it (BERT)."""


class LabelDecoder:
    """Turns labels (token indices) into the text that NeMo's model returns for them."""

    def __init__(self, pieces: Sequence[str], join: Callable[[list[int]], str]) -> None:
        self._label_count, self._join = len(pieces), join
        self._marks = punctuation_marks(pieces)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, pieces: int) -> "LabelDecoder":
        """Uses the first `pieces` tokens of a tokenizer. The unknown token is kept in the text."""
        return cls(
            tokenizer.ids_to_tokens(range(pieces)),
            lambda labels: tokenizer.ids_to_text(labels, remove_special_tokens=False),
        )

    @classmethod
    def from_characters(cls, labels: Sequence[str]) -> "LabelDecoder":
        """Concatenates the labels. The space is one of them."""
        return cls(labels, lambda found: "".join(labels[i] for i in found))

    @classmethod
    def from_word_pieces(cls, pieces: Sequence[str]) -> "LabelDecoder":
        """Puts a space before each piece that starts a word (BERT's vocabularies)."""

        def join(found: list[int]) -> str:
            text = " ".join(pieces[i] for i in found)
            return text.replace(f" {CONTINUATION}", "").strip()

        return cls(pieces, join)

    def __len__(self) -> int:
        """The number of labels; the blank is the next index."""
        return self._label_count

    def __call__(self, labels: list[int]) -> str:
        """Decodes labels that contain no blank."""
        return attach_punctuation(self._join(labels), self._marks)


def nemo_label_decoder(archive: NemoArchive, decoder: str) -> LabelDecoder:
    """The label decoder of an ASR model's `decoder` ("rnnt" or "ctc").

    Raises SettingsError for an archive without labels, or with an unsupported tokenizer.
    """
    if class_name(archive) in CHARACTER_MODELS:
        return LabelDecoder.from_characters(character_labels(archive, decoder))
    if has_word_pieces(archive):
        return LabelDecoder.from_word_pieces(word_pieces(archive))
    found = nemo_tokenizer(archive)
    return LabelDecoder.from_tokenizer(found, len(found))


def class_name(archive: NemoArchive) -> str:
    """The name of an archive's NeMo class, without its module."""
    return str(archive.config.get("target")).rpartition(".")[2]


def has_word_pieces(archive: NemoArchive) -> bool:
    """Whether an archive's tokenizer is BERT's, of word pieces."""
    return str((archive.config.get("tokenizer") or {}).get("type")).lower() == "wpe"


def character_labels(archive: NemoArchive, decoder: str) -> list[str]:
    """The labels in a character model's config: those of the decoder, else those of the model."""
    config = archive.config
    heads = (config.get("aux_ctc") or {}).get("decoder"), config.get("decoder")
    blocks = heads if decoder == "ctc" else (config.get("joint"),)
    listed = [(block or {}).get("vocabulary") for block in blocks] + [config.get("labels")]
    found = next((labels for labels in listed if labels), None)
    if not isinstance(found, list):
        raise SettingsError(f"{archive.path}: its config lists no labels (decoder.vocabulary)")
    return [str(label) for label in found]


def word_pieces(archive: NemoArchive) -> list[str]:
    """The labels of a model with word pieces. Raises SettingsError if its archive has none."""
    reference = archive.config["tokenizer"].get("vocab_path")
    if not isinstance(reference, str):
        raise SettingsError(f"{archive.path}: its config names no file of word pieces (vocab_path)")
    lines = archive.artifact(reference).decode("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]
