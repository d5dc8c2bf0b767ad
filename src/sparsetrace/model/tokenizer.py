"""Text to token ids and back, by SentencePiece's `tokenizer.model` or by `tokenizer.json`."""

import functools
from pathlib import Path

from sparsetrace.core.files import InputError, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# Files that say how a tokenizer is applied; copied with it.
COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        folder: holds `tokenizer.json`, which is preferred since it has the special tokens, or `tokenizer.model`.
        vocab_size: of the model; ids at or beyond it are refused.
        bos: id put before every text; None for none.
    """

    def __init__(self, folder: Path, vocab_size: int, bos: int | None) -> None:
        self.vocab_size = vocab_size
        self.bos = bos
        try:
            if (folder / "tokenizer.json").is_file():
                from tokenizers import Tokenizer as Backend

                backend = Backend.from_file(str(folder / "tokenizer.json"))
                # a file saved with padding or truncation switched on would change the ids of a text
                backend.no_padding()
                backend.no_truncation()
                self._encode = lambda text: backend.encode(text, add_special_tokens=False).ids
                self._decode = lambda ids: backend.decode(ids, skip_special_tokens=False)
            elif (folder / "tokenizer.model").is_file():
                from sentencepiece import SentencePieceProcessor

                processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
                self._encode = processor.encode
                self._decode = processor.decode
            else:
                raise InputError(f"tokenizer: {folder} must hold {' or '.join(TOKENIZER_FILES)}, got neither")
        except (RuntimeError, OSError) as error:
            raise InputError(f"tokenizer: {folder} must hold a readable tokenizer, got {error}") from None

    def encode(self, text: str, where: str) -> list[int]:
        """Token ids of a text, the begin token first.

        Raises:
            InputError: an id lies beyond the model's vocabulary: the tokenizer is another model's.
        """
        ids = ([] if self.bos is None else [self.bos]) + list(self._encode(text))
        if ids and max(ids) >= self.vocab_size:
            raise InputError(
                f"{where}: token ids must be below the model's vocabulary of {self.vocab_size}, got {max(ids)}: "
                "the tokenizer belongs to another model"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return str(self._decode(ids))

    @functools.cache  # noqa: B019  # one tokenizer per process
    def piece(self, token_id: int) -> str:
        """Text of a single token."""
        return self.decode([token_id])


def begin_token(folder: Path, bos: int | None) -> int | None:
    """The begin token put before prompts: `bos`, or None if `tokenizer_config.json` says that none is added."""
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_json(settings, "tokenizer").get("add_bos_token") is False:
        return None
    return bos
