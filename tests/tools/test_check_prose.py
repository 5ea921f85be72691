"""check_prose refuses docstrings without a subject and kernels without shapes, and only those."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_prose import main, problems

GOOD = '''"""A module."""

LIMIT = 3
"""Limit of tiles, of any size, that is to say what a step may have."""


class Of:
    """Offsets of tiles, whatever their size."""

    size: int
    """Bytes."""

    def whole(self) -> bool:
        """Whether the tile is whole."""
        return self.size == LIMIT
'''


def written(folder: Path, name: str, source: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def lines(path: Path) -> list[int]:
    return [problem.line for problem in problems(path)]


@pytest.mark.parametrize(
    "begun",
    [
        "Of the seconds of a chunk.",
        "What a tile reads.",
        "Who calls.",
        "Whoever waits.",
        "Whether it is merged or not.",
        "All of them.",
        "The same for rows.",
    ],
)
@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""{}"""\n', 1),
        ('"""{}\n\nMore.\n"""\n', 1),
        ('class A:\n    """{}"""\n', 2),
        ('class A:\n    size: int\n    """{}"""\n', 3),
        ('LIMIT = 3\n"""{}"""\n', 2),
        ('def f() -> None:\n    """{}"""\n', 2),
        ('async def f() -> None:\n    """\n    {}\n    """\n', 2),
        ('class A:\n    def f(self) -> None:\n        self.x = 1\n        """{}"""\n', 4),
    ],
)
def test_fragments_are_refused(begun: str, source: str, line: int, tmp_path: Path) -> None:
    assert lines(written(tmp_path, "a.py", source.format(begun))) == [line]


def test_sentences_and_strings_that_are_no_docstrings_pass(tmp_path: Path) -> None:
    assert lines(written(tmp_path, "a.py", GOOD)) == []
    assert lines(written(tmp_path, "b.py", 'f("Of course")\nx = """What is it?"""\n')) == []


KERNEL = '''@triton.jit(do_not_specialize=["n"])
def _add(x, n, BLOCK: tl.constexpr):
    """{}"""
'''
CONSTANTS = '''@triton.jit
def empty(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """An empty state."""
'''
PLAIN = '''def add(x: Tensor, y: tuple[Tensor, ...] | None) -> None:
    """{}"""
'''
METHOD = '''class Kernels:
    """The kernels."""

    def add(self, *, x: torch.Tensor) -> None:
        """{}"""
'''


@pytest.mark.parametrize(("source", "line"), [(KERNEL, 2), (PLAIN, 1), (METHOD, 4)])
@pytest.mark.parametrize("text", ["Adds one.", "Adds x[i] to y[i, j].", "Adds x []."])
def test_python_kernels_without_shapes_are_refused(
    source: str, line: int, text: str, tmp_path: Path
) -> None:
    source = source.format(text)
    assert lines(written(tmp_path, "kernels/a.py", source)) == [line]
    assert lines(written(tmp_path, "other/a.py", source)) == []


@pytest.mark.parametrize("source", [KERNEL, PLAIN, METHOD])
@pytest.mark.parametrize("text", ["x [rows, in]. Adds one.", "Adds one to x [2 * n]."])
def test_python_kernels_with_shapes_pass(source: str, text: str, tmp_path: Path) -> None:
    assert lines(written(tmp_path, "kernels/a.py", source.format(text))) == []


def test_python_functions_that_need_no_shapes_pass(tmp_path: Path) -> None:
    private = PLAIN.replace("add", "_add")
    scalars = 'def rows(count: int) -> int:\n    """Rows of a tile."""\n'
    protocol = METHOD.format("See AdapterRows. Each row is a tile.")
    source = "\n\n".join((CONSTANTS, private, scalars, protocol))
    assert lines(written(tmp_path, "kernels/a.py", source)) == []


@pytest.mark.parametrize(
    "function",
    [
        "static void add(const float *x, long n) {\n}\n",
        "INLINE float NAME(dot)(const NAME(Task) *task, const ELEMENT *x,\n    long n) {\n}\n",
        "int pack(const uint8_t *codes, int64_t n) { return 0; }\n",
    ],
)
@pytest.mark.parametrize("name", ["kernels/a.h", "kernels/native/a.c"])
def test_c_functions_without_shapes_are_refused(function: str, name: str, tmp_path: Path) -> None:
    assert lines(written(tmp_path, name, function)) == [1]
    assert lines(written(tmp_path, name, "// Adds x[i].\n" + function)) == [2]
    assert lines(written(tmp_path, name, "// x [n].\n\n" + function)) == [3]
    assert lines(written(tmp_path, name, "// Adds to x\n// [n].\n" + function)) == []


def test_c_functions_without_pointers_to_numbers_pass(tmp_path: Path) -> None:
    source = """typedef void (*Work)(void *context, float *x);
static inline long sum(long a, long b) { return a + b; }
static void run(const Task *task, void *context) {
  if (add(task->x)) {
    float *y = task->y;
  }
}
void declared(float *x);
"""
    assert lines(written(tmp_path, "kernels/a.h", source)) == []


def test_the_command_prints_every_problem_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = written(tmp_path, "good/a.py", '"""Rows of a tile."""\n')
    bad = written(tmp_path, "bad/b.py", 'X = 1\n"""Of a tile."""\n')
    assert main([str(good.parent)]) == 0
    assert capsys.readouterr().out == ""
    assert main([str(good.parent), str(bad.parent)]) == 1
    text = "the docstring begins with 'Of': give it a subject or a verb"
    assert capsys.readouterr().out == f"{bad}:2: {text}\n"
