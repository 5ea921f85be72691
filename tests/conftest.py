"""Fixtures of all tests: tiny models saved once, one torch thread, and Triton's interpreter where
there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before any kernel is defined, when Triton chooses to compile or to interpret it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import fast_interpreter
import instruction_sets
from seaweed import s3, s3_prefix
from time_limits import TEST_SECONDS
from tiny import save_tiny

if TYPE_CHECKING:
    from peft_cases import PeftCaseOf

__all__ = ["s3", "s3_prefix"]

if not torch.cuda.is_available():
    fast_interpreter.install()
torch.set_num_threads(1)
# Examples may take any time: a slow machine is no fault.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory of an architecture's tiny random model, saved once a run."""
    made: dict[str, Path] = {}

    def directory(architecture: str) -> Path:
        if architecture not in made:
            where = tmp_path_factory.mktemp(architecture)
            made[architecture] = save_tiny(architecture, where / "tiny")
        return made[architecture]

    return directory


@pytest.fixture(scope="session")
def peft_case(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> PeftCaseOf:
    """(family, architecture) -> an adapter and PEFT's answers, computed once a session."""
    from peft_cases import peft_cases  # PEFT takes seconds to import

    return peft_cases(tiny_model, tmp_path_factory.mktemp("families"))


def pytest_report_header() -> str:
    """Returns the line that says which code of the C kernels is tested."""
    best, *rest = (each.name for each in instruction_sets.USABLE)
    return f"instruction sets: {best}; slow tests: {', '.join(rest)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives slow tests TEST_SECONDS each."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))
