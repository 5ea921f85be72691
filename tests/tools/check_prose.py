"""Checks docstrings and the comments of kernels: python tests/tools/check_prose.py FOLDER...

A docstring must not begin as a fragment does (FRAGMENTS). In folders named `kernels`, a function
that takes tensors or pointers must give their shapes, as `x [rows, in]`:

- Triton kernels that have an argument which is not a constant of compile time;
- public Python functions and methods that have an argument annotated as a Tensor, unless their
  docstring refers to the protocol that they implement ("See LowRankKernel.");
- C functions that have a pointer to numbers among their arguments, in the comment above them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FRAGMENTS = re.compile(r"(Of|What|Whoever|Who|All of|The same)\b|Whether\b[^.]*\bor not\b")
"""Beginnings that leave a docstring without a subject."""
SHAPE = re.compile(r"(?<![\w\])])\[[^\[\]]*[\w.][^\[\]]*\]")
"""A bracketed list that is not an index, which follows its array without a space."""
REFERENCE = re.compile(r"See [A-Z]\w*")
"""A reference to a protocol, whose docstring gives the shapes."""
C_FUNCTION = re.compile(r"^(?!typedef\b)\w[^;{}=\n(]*\((?P<arguments>[^;{}]*)\) \{", re.MULTILINE)
"""A definition in C; its arguments may be on several lines."""
C_NUMBERS = re.compile(r"\b(char|float|double|long|ELEMENT|u?int\d+_t) \*")
"""A pointer to numbers; `void *` is opaque, and structs give the shapes of their own fields."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Problem(NamedTuple):
    """A line that the check refuses."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def problems(path: Path) -> list[Problem]:
    """Returns the problems of a source file in order; none for a file of another kind."""
    found: list[tuple[int, str]] = []
    if path.suffix == ".py":
        tree = ast.parse(path.read_text())
        found += _fragments(tree)
        if "kernels" in path.parts:
            found += _python_without_shapes(tree)
    elif path.suffix in (".c", ".h") and "kernels" in path.parts:
        found += _c_without_shapes(path.read_text())
    return [Problem(path, line, text) for line, text in sorted(found)]


def _fragments(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, docstring in _docstrings(tree):
        if begun := FRAGMENTS.match(docstring.strip()):
            yield line, f"the docstring begins with {begun[0]!r}: give it a subject or a verb"


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the docstrings of modules, classes, functions and attributes, with their lines."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        described = isinstance(node, ast.Module | ast.ClassDef | Function)
        for before, statement in zip([None, *body], body, strict=False):
            attribute = isinstance(before, ast.Assign | ast.AnnAssign)
            if (attribute or (described and before is None)) and (text := _text(statement)):
                yield statement.lineno, text


def _text(statement: ast.stmt) -> str | None:
    """Returns the text of a statement that is only a string."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        value = statement.value.value
        return value if isinstance(value, str) else None
    return None


def _python_without_shapes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for function in (node for scope in scopes for node in scope.body):
        if isinstance(function, Function):
            docstring = ast.get_docstring(function) or ""
            if _needs_shapes(function, docstring) and not SHAPE.search(docstring):
                yield function.lineno, f"{function.name} takes tensors: give their shapes"


def _needs_shapes(function: Function, docstring: str) -> bool:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    annotations = [
        "" if each.annotation is None else ast.unparse(each.annotation) for each in every
    ]
    if any("triton.jit" in ast.unparse(each) for each in function.decorator_list):
        return any("constexpr" not in each for each in annotations)
    public = not function.name.startswith("_")
    tensors = any(re.search(r"\bTensor\b", each) for each in annotations)
    return public and tensors and not REFERENCE.match(docstring)


def _c_without_shapes(source: str) -> Iterator[tuple[int, str]]:
    lines = source.split("\n")
    for definition in C_FUNCTION.finditer(source):
        if C_NUMBERS.search(definition["arguments"]):
            line = source.count("\n", 0, definition.start())
            if not SHAPE.search(_comment_above(lines, line)):
                name = definition[0].split("\n")[0].rstrip(" {")
                yield (
                    line + 1,
                    f"`{name}` takes pointers: give their shapes in the comment above it",
                )


def _comment_above(lines: list[str], line: int) -> str:
    first = line
    while first and lines[first - 1].startswith("//"):
        first -= 1
    return " ".join(each.removeprefix("//") for each in lines[first:line])


def main(folders: list[str]) -> int:
    """Prints the problems of all files in the folders; returns 1 if there are any."""
    paths = sorted(path for folder in folders for path in Path(folder).rglob("*.*"))
    found = [problem for path in paths for problem in problems(path)]
    for problem in found:
        print(problem)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
