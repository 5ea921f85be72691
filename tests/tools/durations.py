"""Writes where a test run's time went, as Markdown, from the JUnit file that pytest wrote.

`pytest --junitxml=run.xml`, then `python tests/tools/durations.py run.xml --most 30`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree


def timed_tests(report: Path) -> Iterator[tuple[str, str, float]]:
    """Yields (file, function, seconds) of each test case; parameters are cut off the function."""
    for case in ElementTree.parse(report).iter("testcase"):
        file = "/".join(part for part in case.get("classname", "").split("."))
        yield file, case.get("name", "").partition("[")[0], float(case.get("time", 0))


def table(report: Path, most: int) -> list[str]:
    """Returns the lines of two tables: seconds by file, and by test function."""
    files: Counter[str] = Counter()
    functions: Counter[tuple[str, str]] = Counter()
    cases: Counter[tuple[str, str]] = Counter()
    for file, function, seconds in timed_tests(report):
        files[file] += seconds  # type: ignore[assignment]
        functions[file, function] += seconds  # type: ignore[assignment]
        cases[file, function] += 1
    lines = [f"{sum(cases.values())} tests, {sum(files.values()):.0f} s of tests", ""]
    lines += ["| file | seconds |", "|---|---|"]
    lines += [f"| `{file}.py` | {seconds:.0f} |" for file, seconds in files.most_common(most)]
    lines += ["", "| test | cases | seconds |", "|---|---|---|"]
    for (file, function), seconds in functions.most_common(most):
        lines.append(f"| `{file}.py::{function}` | {cases[file, function]} | {seconds:.0f} |")
    return lines


def main() -> None:
    """Prints the tables of the report named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--most", type=int, default=30)
    options = parser.parse_args()
    print("\n".join(table(options.report, options.most)))


if __name__ == "__main__":
    main()
