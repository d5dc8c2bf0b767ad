"""The embedded model's tokenizer, its training ids and its prompts."""

import io
from collections.abc import Callable

import torch
from torch import Tensor

from sparsetrace.core.files import InputError
from sparsetrace.model.demo.corpus import Document
from sparsetrace.model.demo.shape import BOS, CONFIG, EOS, UNK

NUM_PROMPTS = 32
# Length of the shortest and the longest prompt.
PROMPT_TOKENS = (24, 64)

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


def train_tokenizer(documents: list[Document], unused: int = 0) -> bytes:
    """Train a SentencePiece model on the training text.

    Args:
        documents: to train on.
        unused: number of additional ids, which only the texts `<unused0>`, ... encode to: for a model of a larger
            vocabulary, which may choose them.

    Returns:
        The bytes of `tokenizer.model`.
    """
    from sentencepiece import SentencePieceTrainer

    proto = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(paragraph for document in documents for paragraph in document.paragraphs),
        model_writer=proto,
        model_type="bpe",
        vocab_size=CONFIG.vocab_size + unused,
        user_defined_symbols=[f"<unused{number}>" for number in range(unused)],
        byte_fallback=True,
        # as in Llama's tokenizer: text round-trips exactly, and each digit is a token
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
    )
    return proto.getvalue()


def tokenizer_functions(proto: bytes) -> tuple[Encode, Decode]:
    """Text to ids and back, from the bytes of `tokenizer.model`."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=proto)
    return processor.encode, processor.decode


def document_ids(encode: Encode, document: Document) -> Tensor:
    """Ids of a document between the begin and end tokens, so that the model learns to stop."""
    return torch.tensor([BOS, *encode(document.text), EOS])


def cut_prompts(documents: list[Document], encode: Encode, decode: Decode) -> list[str]:
    """Beginnings of paragraphs, cut between words, with lengths spread evenly over `PROMPT_TOKENS`.

    Raises:
        InputError: the documents hold too few paragraphs of such lengths.
    """
    low, high = PROMPT_TOKENS
    prompts: list[str] = []
    for document in documents:
        for paragraph in document.paragraphs:
            wanted = low + (high - low) * len(prompts) // (NUM_PROMPTS - 1)
            # up to the wanted number of tokens, and back to the last space: a word is never cut
            beginning = decode(encode(paragraph)[: wanted + 1]).rpartition(" ")[0]
            if len(encode(beginning)) >= max(low, wanted - 8) and beginning != paragraph:
                prompts.append(beginning)
                # at most one from each document, so that they differ
                break
        if len(prompts) == NUM_PROMPTS:
            return prompts
    raise InputError(f"demo: the held-out text must hold {NUM_PROMPTS} prompts, got {len(prompts)}")
