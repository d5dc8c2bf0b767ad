"""A checkpoint's tokenizer as transformers makes it from the same folder; convert writes it as one `tokenizer.json`.

| folder holds | tokenizer_class | what is applied |
|---|---|---|
| `tokenizer.json` | any, with byte-level pieces; or any but LlamaTokenizer | the file as it is |
| `tokenizer.json` | LlamaTokenizer | its pieces, merges and template; spaces are Llama's |
| `tokenizer.model` | LlamaTokenizer | its pieces; spaces are Llama's |
| `tokenizer.model` | any other, or none | its pieces and normalisation; no space is put before a text |

A Mistral checkpoint counts as one without LlamaTokenizer, whatever it says. Added tokens come on top of each.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from sparsetrace.core.files import InputError, read_json
from sparsetrace.model.sentencepiece_file import Pieces, merges_of, read_pieces

SPACE = "▁"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LLAMA_DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def read_tokenizer(folder: Path, model_type: str) -> Tokenizer:
    """The tokenizer of a checkpoint folder, with the template that says what is put before a text.

    Raises:
        InputError: a file cannot be read, or two of them disagree.
    """
    settings = _settings(folder)
    named = settings.get("tokenizer_class")
    llama = str(named).removesuffix("Fast") == "LlamaTokenizer" and model_type != "mistral"
    file, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if file.is_file():
        content = read_json(file, "tokenizer")
        kind = content.get("model")
        if llama and isinstance(kind, dict) and kind.get("type") == "BPE" and "ByteLevel" not in json.dumps(content):
            content |= _llama_spaces(settings) | {"model": _bpe(kind.get("vocab"), kind.get("merges"), None, True)}
        tokenizer = build(file, content)
    elif model.is_file():
        pieces = read_pieces(model)
        tokenizer = _from_pieces(pieces, settings, llama, model)
        settings = (LLAMA_DEFAULTS if llama else {"unk_token": pieces.unknown}) | settings
    else:
        raise InputError(f"tokenizer: {folder} must hold tokenizer.json or tokenizer.model, got neither")
    _add_tokens(tokenizer, folder, settings)
    return tokenizer


def begin_token(tokenizer: Tokenizer, folder: Path) -> int | None:
    """Id of the token that a tokenizer puts before every text; None if it puts none.

    Raises:
        InputError: it adds anything else, such as an end token.
    """
    with_added, alone = (tokenizer.encode("a", add_special_tokens=add).ids for add in (True, False))
    if with_added == alone:
        return None
    if with_added[1:] != alone:
        raise InputError(
            f"tokenizer: {folder} must put one begin token before a text or none, got {with_added} for {alone}: remove "
            "the rest from post_processor in tokenizer.json, or add_eos_token from tokenizer_config.json"
        )
    return int(with_added[0])


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json where it lists no added tokens."""
    file, named = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = read_json(file, "tokenizer") if file.is_file() else {}
    if "added_tokens_decoder" not in settings and named.is_file():
        settings = settings | read_json(named, "tokenizer")
    return settings


def build(path: Path, content: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of content in the place of the file's.

    Raises:
        InputError: it is none.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path)) if content is None else Tokenizer.from_str(json.dumps(content))
    # tokenizers raises nothing narrower, and ends in Rust's panic for some files
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"tokenizer: {path} must hold a readable tokenizer, got {str(error)[:200]}") from None
    # a file saved with padding or truncation switched on would change the ids of a text
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _llama_spaces(settings: dict[str, Any]) -> dict[str, Any]:
    """A space is a piece's own character, and one is put before a text that has none."""
    prefix = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}, *strip]},
    }


def _bpe(vocabulary: Any, merges: Any, unknown: str | None, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "vocab": vocabulary,
        "merges": merges,
    }


def _as_written(pieces: Pieces) -> dict[str, Any]:
    """Spaces and normalisation as the file has them, and no space before a text."""
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(pieces.charsmap).decode()}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    fallback = [{"type": "ByteFallback"}, {"type": "Fuse"}] if pieces.byte_fallback else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*([charsmap] if pieces.charsmap else []), spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, *fallback]},
    }


def _from_pieces(pieces: Pieces, settings: dict[str, Any], llama: bool, path: Path) -> Tokenizer:
    merges = [list(pair) for pair in merges_of(pieces.vocabulary)]
    unknown, byte_fallback = (None, True) if llama else (pieces.unknown, pieces.byte_fallback)
    tokenizer = build(
        path,
        {"version": "1.0", "added_tokens": [], "post_processor": None}
        | (_llama_spaces(settings) if llama else _as_written(pieces))
        | {"model": _bpe(pieces.vocabulary, merges, unknown, byte_fallback)},
    )
    added = pieces.added.items()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in added])
    ends = {}
    for end in ("bos", "eos"):
        if settings.get(f"add_{end}_token") is True:
            text = _content(settings.get(f"{end}_token", LLAMA_DEFAULTS[f"{end}_token"]))
            if not isinstance(text, str) or text not in pieces.vocabulary:
                raise InputError(f"tokenizer: {path}: {end}_token must be one of its pieces, got {text!r}")
            ends[end] = (text, pieces.vocabulary[text])
    if ends:
        single = [ends["bos"][0]] if "bos" in ends else []
        single += ["$A", *([ends["eos"][0]] if "eos" in ends else [])]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=list(ends.values()))
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, folder: Path, settings: dict[str, Any]) -> None:
    """Add the tokens that the settings name, and see that each has the id that they give it."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = list(_named_tokens(folder, settings))
    for token, _ in sorted(named, key=lambda pair: (pair[1] is None, pair[1] or 0)):
        if token.content not in known:
            known.add(token.content)
            tokenizer.add_tokens([token])
    for token, given in named:
        if given is not None and (found := tokenizer.token_to_id(token.content)) != given:
            raise InputError(
                f"tokenizer: {folder}: token {token.content!r} must have the id {given} that the added tokens give it, "
                f"got {found}: the files belong to different tokenizers"
            )


def _named_tokens(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[AddedToken, int | None]]:
    """Added tokens, those with an id first."""
    listed = settings.get("added_tokens_decoder")
    file = folder / "added_tokens.json"
    where = f"tokenizer: {folder}"
    if listed is None and file.is_file():
        listed = {number: text for text, number in read_json(file, "tokenizer").items()}
    if not isinstance(listed, dict | None):
        raise InputError(f"{where}: added_tokens_decoder must be an object, got {type(listed).__name__}")
    named = {name: settings[name] for name in NAMED if settings.get(name) is not None}
    special = {_content(value) for value in named.values()}
    for number, value in (listed or {}).items():
        if not str(number).isdecimal() or len(str(number)) > 9:
            raise InputError(f"{where}: ids of added tokens must be integers, got {number!r:.80}")
        flags = value if isinstance(value, dict) else {"special": value in special, "normalized": value not in special}
        yield _token(value, flags, where), int(number)
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise InputError(f"{where}: extra_special_tokens must be a list or an object, got {extra!r:.80}")
    for value in (*named.values(), *(extra.values() if isinstance(extra, dict) else extra)):
        yield (
            _token(value, (value if isinstance(value, dict) else {"normalized": False}) | {"special": True}, where),
            None,
        )


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _token(value: Any, flags: dict[str, Any], where: str) -> AddedToken:
    content = _content(value)
    if not isinstance(content, str) or not content:
        raise InputError(f"{where}: added tokens must have text, got {value!r:.80}")
    return AddedToken(content, **{name: flags[name] is True for name in FLAGS if name in flags})
