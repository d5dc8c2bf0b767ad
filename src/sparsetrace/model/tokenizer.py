"""Text to token ids and back, by a runtime model's `tokenizer.json`."""

import functools

from tokenizers import Tokenizer as Backend

from sparsetrace.core.files import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# Files that say how a tokenizer is applied; copied with it.
COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


class Tokenizer:
    """A model's tokenizer.

    Args:
        backend: what is applied.
        vocab_size: of the model; ids at or beyond it are refused.
        bos: id put before every text; None for none.
    """

    def __init__(self, backend: Backend, vocab_size: int, bos: int | None) -> None:
        self.backend = backend
        self.vocab_size = vocab_size
        self.bos = bos

    def encode(self, text: str, where: str) -> list[int]:
        """Token ids of a text, the begin token first.

        Raises:
            InputError: an id lies beyond the model's vocabulary: the tokenizer is another model's.
        """
        ids = [] if self.bos is None else [self.bos]
        ids += self.backend.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.vocab_size:
            raise InputError(
                f"{where}: token ids must be below the model's vocabulary of {self.vocab_size}, got {max(ids)}: "
                "the tokenizer belongs to another model"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; an id that is none of the tokenizer's, as in a padded vocabulary, has none."""
        return str(self.backend.decode(ids, skip_special_tokens=False))

    @functools.cache  # noqa: B019  # one tokenizer per process
    def piece(self, token_id: int) -> str:
        """Text of a single token."""
        return self.decode([token_id])
