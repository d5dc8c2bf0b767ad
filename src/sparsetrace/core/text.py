"""Reading documents from files: prompts, and texts for calibration and quality.

| file | each document is |
|---|---|
| `.jsonl` | a field of one line |
| `.json` | a field of one element, of a list or of the only list in an object |
| `.txt` | one line that is not blank; a prompt of several lines needs `.jsonl` |

Any of them may be gzipped (`.gz`).
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from sparsetrace.core.files import InputError

# Field names under which prompts are commonly published; the first one that a record has is read.
FIELDS = ("prompt", "question", "instruction", "turns", "text", "input", "content")


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
            records = [_parse(line, f"{where}: {path}:{i + 1}") for i, line in enumerate(_lines(text)) if line.strip()]
            documents = [_text(record, field, f"{where}: {path}: record {i}") for i, record in enumerate(records)]
        case ".json":
            records = _only_list(_parse(text, f"{where}: {path}"), f"{where}: {path}")
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
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{where}: {path} must be a file, got nothing there") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{where}: {path} must be readable UTF-8 text, got {error}") from None


def _lines(text: str) -> list[str]:
    # `str.splitlines` also splits at form feeds and U+2028, which occur within texts
    return text.replace("\r\n", "\n").split("\n")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} must be JSON, got {error}") from None


def _only_list(content: Any, where: str) -> list[Any]:
    if isinstance(content, list):
        return content
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
    if len(lists) != 1:
        raise InputError(f"{where} must be a list, or an object with one list, got {len(lists)} lists")
    return list(lists[0])


def _text(record: Any, field: str | None, where: str) -> str:
    if isinstance(record, str) and field is None:
        return record
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
    return first
