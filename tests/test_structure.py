"""The shape of the package: short modules of one idea, short parameter lists, no circle of imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import sparsetrace

PACKAGE = Path(sparsetrace.__file__).parent
MODULES = {
    ".".join(("sparsetrace", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAX_LINES, MAX_PARAMETERS = 400, 7


def test_modules_are_short():
    long = {name: count for name, path in MODULES.items() if (count := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_parameter_lists_are_short():
    """More want an object; a command's options come from click, and methods of a kernel path mirror its arguments."""
    long = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([a for a in arguments if a not in ("self", "cls")]) > MAX_PARAMETERS:
                    long.append(f"{name}.{node.name}")
    assert not long


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a module names when it is imported, and inside functions; not for types alone."""

    def visit(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            yield child
            yield from visit(child)

    for node in visit(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_circle_of_imports():
    # the package's own `__init__` loads `sparsetrace.open` on first use
    graph = {
        name: {module for module in imported(path) if module in MODULES and module not in (name, "sparsetrace")}
        for name, path in MODULES.items()
        if name != "sparsetrace"
    }
    # a module that imports nothing that is left belongs to no circle
    while free := [name for name, modules in graph.items() if not modules]:
        for name in free:
            del graph[name]
        for modules in graph.values():
            modules.difference_update(free)
    assert not graph


def test_packages_have_empty_inits():
    """A rule's source hash covers the packages of what it imports, so what stands there would re-run every step."""
    inits = [path for name, path in MODULES.items() if path.name == "__init__.py" and name.count(".") == 1]
    filled = [path.parent.name for path in inits if path.read_text().strip()]
    assert filled == ["methods"]
