"""Checks that the tests catch faults: breaks a copy of the tree in one place at a time.

    make mutants
    make mutants ARGS="salt window"     # mutants whose names contain one of the words
    make mutants ARGS="--fast"          # without mutants of C kernels, whose builds take minutes

Each mutant replaces one fragment of code and names the tests that must fail then. The tests run
with this interpreter on the copy. The exit code is 1 if a mutant survives, if its fragment is not
found exactly once, or if its tests do not pass on the unchanged copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("protos", "adapters", "server", "clients")
TEST_SECONDS = 1800.0
"""Limit of the tests of one mutant, builds of C kernels included."""

ADAPTERS, ENGINE = "adapters/adaplex/adapters", "server/adaplex/engine"
MODEL, SERVER = "server/adaplex/model", "server/adaplex/server"


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, which the file contains once, becomes `new`; one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    slow: bool = False
    """True if it changes C kernels, which are then built in a cache folder of its own."""


MUTANTS = (
    Mutant(
        "scheduler: prefill turns go to the lowest priority",
        f"{ENGINE}/scheduler.py",
        "return -self.priority, self.last",
        "return self.priority, self.last",
        ("tests/engine/test_prefill_budget.py",),
    ),
    Mutant(
        "fairness: generated tokens are not charged",
        f"{ENGINE}/fairness.py",
        "PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output",
        "PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * min(output, 0)",
        ("tests/engine/test_fairness.py",),
    ),
    Mutant(
        "block manager: a block's hash misses its last token",
        f"{ENGINE}/block_manager.py",
        "index * self._block_tokens, (index + 1) * self._block_tokens",
        "index * self._block_tokens, (index + 1) * self._block_tokens - 1",
        ("tests/engine/test_block_manager.py",),
    ),
    Mutant(
        "block manager: tenants with another cache salt share prefixes",
        f"{ENGINE}/block_manager.py",
        '(b"salt", sequence.request.cache_salt.encode())',
        '(b"salt", sequence.request.cache_salt.encode()[:0])',
        ("tests/engine/test_block_manager.py",),
    ),
    Mutant(
        "block manager: a block before the invocation is not shared with the base",
        f"{ENGINE}/block_manager.py",
        "sequence.adapter_key if end > sequence.adapter_from",
        "sequence.adapter_key if end >= sequence.adapter_from",
        ("tests/engine/test_invocation.py",),
    ),
    Mutant(
        "arena: eviction ignores pins",
        f"{ENGINE}/unmerged_residency.py",
        "self._arena.reserve(digest, nbytes, exempt=self._pins)",
        "self._arena.reserve(digest, nbytes)",
        ("tests/engine/test_pins.py",),
    ),
    Mutant(
        "adapter cache: eviction ignores leases",
        f"{ENGINE}/adapter_cache.py",
        "self.resident and not self.leases and not self.readers",
        "self.resident and not self.readers",
        ("tests/engine/test_adapter_cache.py",),
    ),
    Mutant(
        "adapter cache: a waiter without room can be bypassed forever",
        f"{ENGINE}/adapter_cache.py",
        "self.blocked.bypassed += 1",
        "self.blocked.bypassed += 0",
        ("tests/engine/test_residency.py", "tests/engine/test_pins.py"),
    ),
    Mutant(
        "merged weights: a background build evicts weights that pay",
        f"{ENGINE}/merged_residency.py",
        "self._start_build(digest, share.nbytes, exempt=exempt)",
        "self._start_build(digest, share.nbytes)",
        ("tests/engine/test_engine_adapters.py",),
    ),
    Mutant(
        "registry: the lease of a mix's first adapter is not released",
        f"{ADAPTERS}/registry/registry.py",
        "digest for lease in leases for digest in lease.release()",
        "digest for lease in leases[1:] for digest in lease.release()",
        ("tests/adapters/test_registry.py", "tests/adapters/test_registry_mixes.py"),
    ),
    Mutant(
        "registry: the shares of a split alias do not add up",
        f"{ADAPTERS}/storage/alias_split.py",
        "accumulate(target.weight / total for target in split)",
        "(target.weight / total for target in split)",
        ("tests/adapters/test_alias_split.py",),
    ),
    Mutant(
        "lowering: rsLoRA scales by the rank instead of its root",
        f"{ADAPTERS}/formats/lora/pairs.py",
        '(math.sqrt(rank) if config.get("use_rslora") else rank)',
        '(math.sqrt(rank) if config.get("use_rslora") is None else rank)',
        ("tests/adapters/test_lora.py",),
    ),
    Mutant(
        "lowering: the bias of lora_B is not scaled",
        f"{ADAPTERS}/formats/lora/pairs.py",
        "return bias.float() * scale",
        "return bias.float()",
        ("tests/adapters/test_lora_extras.py",),
    ),
    Mutant(
        "digest: the order of invocation tokens does not count",
        f"{ADAPTERS}/digest.py",
        "isinstance(value, list) and field not in ORDERED",
        "isinstance(value, list)",
        ("tests/adapters/test_digest.py",),
    ),
    Mutant(
        "torch kernels: the attention window is one key too long",
        f"{MODEL}/kernels/reference.py",
        "key_positions > row_positions - window",
        "key_positions >= row_positions - window",
        ("tests/model/kernels/test_paged_attention.py",),
    ),
    Mutant(
        "Triton kernels: the last rank is dropped",
        f"{MODEL}/kernels/triton/low_rank.py",
        "inside = (r < rank)[:, None] & (o < width)[None, :]",
        "inside = (r < rank - 1)[:, None] & (o < width)[None, :]",
        ("tests/model/kernels/test_triton_low_rank.py",),
    ),
    Mutant(
        "C kernels: the last rank is dropped if the rank is odd",
        f"{MODEL}/kernels/native/low_rank.h",
        "if (site->rank % 2)",
        "if (site->rank % 2 && site->rank < 0)",
        ("tests/model/kernels/test_native_low_rank.py",),
        slow=True,
    ),
    Mutant(
        "C kernels: the attention window is one key too short",
        f"{MODEL}/kernels/native/attention.h",
        "window && seen > window ? seen - window : 0",
        "window && seen > window ? seen - window + 1 : 0",
        (
            "tests/model/forward/test_native_forward.py::test_long_prompts_in_chunks_equal_the_modules",
        ),
        slow=True,
    ),
    Mutant(
        "stop strings: a pending one is one character too short",
        f"{SERVER}/stop_strings.py",
        "longest = min(len(text), len(stop) - 1)",
        "longest = min(len(text), len(stop) - 2)",
        ("tests/server/test_stop_strings.py",),
    ),
    Mutant(
        "upload: the offset of a chunk is not checked",
        f"{SERVER}/upload.py",
        'check("chunk.offset", chunk.offset == offset',
        'check("chunk.offset", chunk.offset >= 0',
        ("tests/server/test_upload.py",),
    ),
    Mutant(
        "upload: the digest of a file is not checked",
        f"{ADAPTERS}/storage/staging.py",
        "if digest.hexdigest() != file.sha256:",
        "if len(digest.hexdigest()) != len(file.sha256):",
        ("tests/adapters/test_folder_content.py", "tests/server/test_upload.py"),
    ),
    Mutant(
        "detokenizer: a character of more than two tokens is not awaited",
        f"{SERVER}/text.py",
        "pending <= MAX_PENDING_TOKENS",
        "pending <= 1",
        ("tests/server/test_text.py",),
    ),
)


class Outcome(Enum):
    """The outcome of a mutant. Only CAUGHT is a success."""

    CAUGHT = "caught"
    SURVIVED = "SURVIVED"
    NOT_FOUND = "NOT FOUND"
    NOT_RUN = "NOT RUN"


def copy_tree(target: Path) -> None:
    """Copies the files that git tracks, and those that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # else deleted, and not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def run_tests(tree: Path, tests: Sequence[str], cache: Path | None = None) -> tuple[int, str]:
    """Runs tests of a tree up to the first failure; returns pytest's exit code and output.

    `cache` replaces the cache folder for built kernels and models.
    """
    paths = os.pathsep.join(str(tree / source) for source in SOURCES)
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    if cache is not None:
        environment["ADAPLEX_CACHE"] = str(cache)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=TEST_SECONDS,
    )
    return done.returncode, done.stdout


def try_mutant(tree: Path, mutant: Mutant) -> Outcome:
    """Applies a mutant to the tree, runs its tests, and restores the tree."""
    path = tree / mutant.file
    text = path.read_text() if path.is_file() else ""
    if text.count(mutant.old) != 1:
        return Outcome.NOT_FOUND
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        with tempfile.TemporaryDirectory() as cache:
            code, _ = run_tests(tree, mutant.tests, Path(cache) if mutant.slow else None)
    except subprocess.TimeoutExpired:
        return Outcome.NOT_RUN
    finally:
        path.write_text(text)
    return {0: Outcome.SURVIVED, 1: Outcome.CAUGHT}.get(code, Outcome.NOT_RUN)


def selected(words: Sequence[str], fast: bool) -> list[Mutant]:
    """Returns the mutants whose names contain one of the words, all without words."""
    return [
        mutant
        for mutant in MUTANTS
        if not (fast and mutant.slow)
        and (not words or any(word.lower() in mutant.name.lower() for word in words))
    ]


def named_tests(mutants: Iterable[Mutant]) -> list[str]:
    """Returns the tests of all mutants, each once."""
    return list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))


def main() -> int:
    """Tries the selected mutants and prints their outcomes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose names contain one of these")
    parser.add_argument("--fast", action="store_true", help="no mutants of C kernels")
    options = parser.parse_args()
    mutants = selected(options.words, options.fast)
    if not mutants:
        parser.error("no mutant has such a name")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        code, output = run_tests(tree, named_tests(mutants))
        if code:
            print(f"the tests do not pass on the unchanged tree:\n{output[-4000:]}")
            return 1
        outcomes = []
        for mutant in mutants:
            started = time.monotonic()
            outcomes.append(try_mutant(tree, mutant))
            seconds = time.monotonic() - started
            print(f"{outcomes[-1].value:<10}{seconds:6.1f} s  {mutant.name}", flush=True)
    caught = outcomes.count(Outcome.CAUGHT)
    print(f"{caught} of {len(mutants)} mutants caught")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
