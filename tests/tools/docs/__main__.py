"""`python -m tools.docs` writes the generated documents; `--check` names those out of date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.docs.documents import outdated, write

ROOT = Path(__file__).parents[3]


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Returns the exit status: 1 if `--check` finds a document out of date."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare without writing")
    if not parser.parse_args(arguments).check:
        write(root)
        return 0
    names = outdated(root)
    for name in names:
        print(f"{name} is out of date: run make docs", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
