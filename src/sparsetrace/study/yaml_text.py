"""YAML that people write, as values: everything that PyYAML raises becomes one line, and its traps are refused.

Refused: a key that stands twice in one mapping, of which PyYAML takes the last; aliases that contain themselves or
unfold to a huge value; and a size, nesting or number that no study has.
"""

from pathlib import Path
from typing import Any

import yaml

from sparsetrace.core.files import InputError, read_regular

# Limits of a study file: a large one has 20 kB, 8 levels and 1,000 values.
MOST_BYTES = 1 << 18
MOST_LEVELS = 32
MOST_VALUES = 50_000


def read_yaml(path: Path, where: str) -> Any:
    """The value of a YAML file.

    Raises:
        InputError: the file is missing, or is not YAML that is taken.
    """
    data = read_regular(path, where, most=MOST_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {path} must be YAML in UTF-8, got {error}") from None
    return parse_yaml(text, f"{where}: {path}")


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        text: one document.
        where: for the message, `<step>: <place>`.

    Raises:
        InputError: it is not YAML that is taken.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _sizes(node, {}, where)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise InputError(f"{where} must be YAML of at most {MOST_LEVELS} levels, got more") from None
    # besides errors of syntax, what constructing numbers and dates raises: `1: 99999-99-99`, 5,000 digits
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} must be YAML, got {' '.join(str(error).split())}") from None


def _sizes(node: yaml.Node, seen: dict[int, tuple[int, int] | None], where: str) -> tuple[int, int]:
    """Values and levels of a node with every alias unfolded.

    Args:
        node: of the composed document.
        seen: sizes of the nodes met before, by identity; None while a node is walked.
        where: for the message.
    """
    if id(node) in seen:
        known = seen[id(node)]
        if known is None:
            raise InputError(f"{where} must be YAML without an alias inside its own value, got one{_place(node)}")
        return known
    seen[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, value in node.value:
            children += [key, value]
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise InputError(f"{where} must be YAML with each key once, got {key.value!r} twice{_place(key)}")
                keys.add((key.tag, key.value))
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    values, levels = 1, 1
    for child in children:
        more, deeper = _sizes(child, seen, where)
        values, levels = values + more, max(levels, deeper + 1)
    if values > MOST_VALUES:
        raise InputError(f"{where} must be YAML of at most {MOST_VALUES:,} values, got more with its aliases unfolded")
    if levels > MOST_LEVELS:
        raise InputError(f"{where} must be YAML of at most {MOST_LEVELS} levels, got more")
    seen[id(node)] = values, levels
    return values, levels


def _place(node: yaml.Node) -> str:
    return f" in line {node.start_mark.line + 1}" if node.start_mark is not None else ""
