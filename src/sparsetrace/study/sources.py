"""Hash of the source code that a step runs, which makes Snakemake run the step again when that code changes."""

import ast
import hashlib
from functools import cache
from pathlib import Path

from sparsetrace.core.files import sha256_json


def source_hash(*modules: str) -> str:
    """Hash of the named modules and of everything that they import from this project, directly or not.

    Snakemake does not track the code of packages. A rule puts this hash into its `params`, so that a change of the
    code runs exactly those steps again that import what changed.

    Args:
        modules: dotted names below `sparsetrace`, such as `generation.generate`.

    Raises:
        ValueError: there is no such module; without this, a module that moves would leave its rule a constant hash.
    """
    package = Path(__file__).parents[1]
    kernels = package.parents[1] / "kernels" / "sparsetrace_kernels"
    # installed as a wheel, the two packages lie side by side
    kernels = kernels if kernels.is_dir() else package.with_name("sparsetrace_kernels")
    roots = {"sparsetrace": package, "sparsetrace_kernels": kernels}

    def source(name: str) -> Path | None:
        top, *rest = name.split(".")
        # the top package's own file loads its names on first use: it is no step's code
        if top not in roots or (not rest and top == "sparsetrace"):
            return None
        path = roots[top].joinpath(*rest)
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return file if file.is_file() else None

    queue = [f"sparsetrace.{module}" for module in modules]
    if unknown := [name for name in queue if source(name) is None]:
        raise ValueError(f"source_hash: modules must be among those of the package, got {', '.join(unknown)}")
    found: dict[str, str] = {}
    while queue:
        name = queue.pop()
        file = source(name)
        if name in found or file is None:
            continue
        content = file.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
        # importing a module runs the __init__ of its packages first
        queue.append(name.rpartition(".")[0])
        queue.extend(_imported(content))
    return sha256_json(found)[:16]


@cache
def _imported(source: bytes) -> list[str]:
    """Dotted names that a module's source may import, inside functions too; cached, since steps share most modules."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
