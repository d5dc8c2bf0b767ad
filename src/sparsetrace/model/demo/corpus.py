"""The embedded model's text: prose of `pydoc_data.topics` and of the standard library's docstrings, without torch.

It is read from source, nothing is imported. It differs between Python versions, and between distributions that leave
parts of the library out.
"""

import ast
import hashlib
import re
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsetrace.core.files import InputError

# Characters set aside for each held-out part, before paragraphs that share a phrase with the training text are dropped.
HELD_OUT_CHARACTERS = {"validation": 80_000, "calibration": 160_000, "prompts": 80_000}
# A run of this many words in the training text may not occur in a held-out paragraph.
SHARED_WORDS = 8
# Less text than this trains no useful model; CPython 3.11 has 1.7 million characters.
MIN_TRAINING_CHARACTERS = 500_000

WORD = re.compile(r"[\"'(*`]*[A-Za-z][A-Za-z'-]*[\"'*`.,;:)?!]*")
# Folders within the library that are other people's, or tests.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests"}


@dataclass(frozen=True, slots=True)
class Document:
    """A help topic's section, a module's docstring, or the docstrings of one top-level class or function.

    Args:
        name: its place in the standard library.
        paragraphs: prose, each on one line.
    """

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The paragraphs, one per line."""
        return "\n".join(self.paragraphs)

    @property
    def characters(self) -> int:
        """Total length of the paragraphs."""
        return sum(map(len, self.paragraphs))


@dataclass(frozen=True, slots=True)
class Corpus:
    """The text, divided by document; model and tokenizer are trained on `train` alone."""

    train: list[Document]
    validation: list[Document]
    calibration: list[Document]
    prompts: list[Document]


def gather(stdlib: Path) -> list[Document]:
    """Read every document of the standard library; a paragraph that occurs twice is kept once.

    Args:
        stdlib: the folder of the library's sources.
    """
    documents = []
    seen: set[str] = set()
    for name, text in _raw_documents(stdlib):
        paragraphs = []
        for block in re.split(r"\n\s*\n", text):
            paragraph = " ".join(block.split())
            # compared by letters and digits alone: case and punctuation make no new paragraph
            key = "".join(_words(paragraph))
            if _is_prose(paragraph) and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append(Document(name, tuple(paragraphs)))
    return documents


def divide(documents: list[Document]) -> Corpus:
    """Divide by document, in the order of the names' hashes, and drop held-out paragraphs that training repeats.

    Raises:
        InputError: too little is left to train on.
    """
    remaining = iter(sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()))
    held_out: dict[str, list[Document]] = {}
    for part, quota in HELD_OUT_CHARACTERS.items():
        held_out[part] = []
        taken = 0
        while taken < quota and (document := next(remaining, None)) is not None:
            held_out[part].append(document)
            taken += document.characters
    train = list(remaining)
    available = sum(document.characters for document in train)
    if available < MIN_TRAINING_CHARACTERS:
        raise InputError(
            f"demo: the standard library's sources must hold at least {MIN_TRAINING_CHARACTERS} characters of prose to "
            f"train on, got {available}: use a Python with its pydoc_data and .py files"
        )
    known = {phrase for document in train for paragraph in document.paragraphs for phrase in _phrases(paragraph)}
    return Corpus(train, **{part: _without(known, documents) for part, documents in held_out.items()})


def _raw_documents(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of all documents, code and markup included."""
    for topic, text in sorted(_topics(stdlib / "pydoc_data" / "topics.py").items()):
        # a heading is a line above a row of `*`, `=` or `-`
        for number, section in enumerate(re.split(r"(?m)^(?=\S.*\n[*=\-]{3,}$)", text)):
            yield f"pydoc_data/topics/{topic}/{number}", section
    # modules of the standard library only: distributions put other files and packages into the same folder
    for module in sorted(sys.stdlib_module_names):
        sources = [stdlib / f"{module}.py", *sorted((stdlib / module).rglob("*.py"))]
        for source in sources:
            relative = source.relative_to(stdlib)
            if source.is_file() and not EXCLUDED_FOLDERS.intersection(relative.parts):
                yield from _docstrings(relative.as_posix(), _parse(source))


def _parse(source: Path) -> ast.Module:
    """Syntax tree of a source file; empty if it is not valid in this Python, as some of lib2to3's are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source.read_bytes())
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def _topics(source: Path) -> dict[str, str]:
    """The help topics; none if the distribution leaves them out."""
    tree = _parse(source) if source.is_file() else ast.Module(body=[], type_ignores=[])
    literal = next((node for node in ast.walk(tree) if isinstance(node, ast.Dict)), None)
    topics: dict[str, str] = ast.literal_eval(literal) if literal else {}
    return topics


def _docstrings(name: str, module: ast.Module) -> Iterator[tuple[str, str]]:
    """The docstring of a module, then one text per top-level class or function with the docstrings in it."""
    yield name, ast.get_docstring(module) or ""
    for top in module.body:
        if isinstance(top, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}:{top.name}", "\n\n".join(ast.get_docstring(node) or "" for node in _definitions(top))


def _definitions(top: ast.stmt) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """A definition and those within it, in the order of `ast.walk` but without visiting expressions."""
    queue: deque[ast.AST] = deque([top])
    while queue:
        node = queue.popleft()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        # the fields that hold statements, in the order in which every node has them
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            queue.extend(getattr(node, block, ()))


def _is_prose(paragraph: str) -> bool:
    """Whether most of it is plain words; sessions, grammars, tables and code are not."""
    words = paragraph.split()
    plain = sum(bool(WORD.fullmatch(word)) for word in words)
    return len(words) >= 4 and plain >= 0.7 * len(words) and ">>>" not in paragraph


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.casefold())


def _phrases(paragraph: str) -> set[tuple[str, ...]]:
    """All runs of `SHARED_WORDS` words; a shorter paragraph is a single phrase."""
    words = _words(paragraph)
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(max(1, len(words) - SHARED_WORDS + 1))}


def _without(known: set[tuple[str, ...]], documents: list[Document]) -> list[Document]:
    """The documents without the paragraphs that have a phrase in `known`."""
    kept = (Document(d.name, tuple(p for p in d.paragraphs if known.isdisjoint(_phrases(p)))) for d in documents)
    return [document for document in kept if document.paragraphs]
