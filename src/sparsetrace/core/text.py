"""Reading documents from files: prompts, and texts for calibration and quality.

| file | each document is |
|---|---|
| `.jsonl` | a field of one line |
| `.json` | a field of one element, of a list or of the only list in an object |
| `.txt` | one line that is not blank; a prompt of several lines needs `.jsonl` |

Any of them may be gzipped (`.gz`).
"""

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

from sparsetrace.core.files import InputError, parse_json, read_regular

# Field names under which prompts are commonly published; the first one that a record has is read.
FIELDS = ("prompt", "question", "instruction", "turns", "text", "input", "content")
# Bytes of a file, and of what a gzipped one unpacks to: `UNPACKED_BYTES`, or so many times its own size where that is
# more. Text becomes 3 to 20 times as small; a file that unpacks to 1,000 times its size was made to fill the memory.
MOST_BYTES = 1 << 30
UNPACKED_BYTES = 64 << 20
UNPACKED_FACTOR = 100


def read_text(path: Path, field: str | None, where: str) -> str:
    """A file as one running text: a `.txt` as it is, the documents of any other file with blank lines between."""
    if _suffix(path) == ".txt" and field is None:
        return _content(path, where)
    return "\n\n".join(read_documents(path, field, where))


def read_documents(path: Path, field: str | None, where: str) -> list[str]:
    """Documents of a file, in file order.

    Args:
        path: `.jsonl`, `.json` or `.txt`, or gzipped.
        field: name of the field that holds the text; None takes the first of `FIELDS` that a record has.
        where: name of the step, for messages.

    Raises:
        InputError: the file cannot be read, or holds no document.
    """
    text = _content(path, where)
    match _suffix(path):
        case ".txt":
            if field is not None:
                raise InputError(f"{where}: field must not be given for a .txt file, got {field!r}")
            documents = [line for line in _lines(text) if line.strip()]
        case ".jsonl":
            records = [
                parse_json(line, f"{where}: {path}:{i + 1}") for i, line in enumerate(_lines(text)) if line.strip()
            ]
            documents = [_text(record, field, f"{where}: {path}: record {i}") for i, record in enumerate(records)]
        case ".json":
            records = _only_list(parse_json(text, f"{where}: {path}"), f"{where}: {path}")
            documents = [_text(record, field, f"{where}: {path}: record {i}") for i, record in enumerate(records)]
        case _:
            raise InputError(f"{where}: {path} must end in .jsonl, .json, .txt or one of these with .gz")
    if not documents:
        raise InputError(f"{where}: {path} must hold at least one document, got none")
    return documents


def _suffix(path: Path) -> str:
    """Suffix of a file name, without a final `.gz`."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix


def _content(path: Path, where: str) -> str:
    data = read_regular(path, where, most=MOST_BYTES)
    try:
        if path.suffix == ".gz":
            most = min(MOST_BYTES, max(UNPACKED_BYTES, UNPACKED_FACTOR * len(data)))
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(most + 1)
            if len(data) > most:
                raise InputError(f"{where}: {path} must unpack to at most {most:,} bytes, got more: cut it")
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{where}: {path} must be readable UTF-8 text, got {error}") from None


def _lines(text: str) -> list[str]:
    # `str.splitlines` also splits at form feeds and U+2028, which occur within texts
    return text.replace("\r\n", "\n").split("\n")


def _only_list(content: Any, where: str) -> list[Any]:
    if isinstance(content, list):
        return content
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
    if len(lists) != 1:
        raise InputError(f"{where} must be a list, or an object with one list, got {len(lists)} lists")
    return list(lists[0])


def _text(record: Any, field: str | None, where: str) -> str:
    if isinstance(record, str) and field is None:
        return _whole(record, where)
    if not isinstance(record, dict):
        raise InputError(f"{where} must be an object with a text field, got {type(record).__name__}")
    name = field if field is not None else next((name for name in FIELDS if name in record), None)
    if name is None or name not in record:
        wanted = field or f"one of {', '.join(FIELDS)}"
        raise InputError(f"{where} must have the field {wanted}, got {', '.join(record)}: name it in `field`")
    value = record[name]
    # of a conversation, the first turn is read
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str):
        raise InputError(f"{where}: {name} must be text or a list of texts, got {type(first).__name__}")
    return _whole(first, f"{where}: {name}")


def _whole(text: str, where: str) -> str:
    """Refuse half a surrogate pair, which JSON can escape and no encoding of text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} must be text, got half a surrogate pair, {text[error.start]!r}, as character {error.start}"
        ) from None
    return text
