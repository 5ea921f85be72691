"""A start does without torch's compiler, which can be imported nevertheless."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adaplex.model import light_imports
from adaplex.model.base.source import default_cache

ROOT = Path(__file__).parents[2]
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp")


def run(program: str) -> str:
    """Runs a program in a process of its own and returns what it prints."""
    begin = f"import sys; from adaplex.model.light_imports import light_imports; HEAVY = {HEAVY}\n"
    ran = subprocess.run([sys.executable, "-c", begin + program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_building_a_server_imports_no_compiler(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "kernels").symlink_to(default_cache() / "kernels")  # not to build them anew
    program = f"""
with light_imports():
    from adaplex.server.build import build
    from adaplex.server.config import ServerConfig
    settings = dict(model={str(tiny_model("llama"))!r}, store_dir={str(tmp_path / "store")!r})
    settings |= dict(cache={str(tmp_path)!r}, quantization="int4-group", threads=1)
    for _ in range(2):  # from the checkpoint, then from what was saved
        build(ServerConfig(**settings, kv_cache_bytes="1MiB"), lambda line: None)
print([name for name in HEAVY if name in sys.modules])
"""
    assert run(program) == "[]"


@pytest.mark.slow
def test_the_compiler_works_after_the_block() -> None:
    program = """
with light_imports():
    import transformers.masking_utils
import torch
assert not any(name in sys.modules for name in HEAVY)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
print(torch.distributed.is_available(), torch._dynamo.__file__ is not None)
"""
    assert run(program).split() == ["2.0", "True", "True"]


@pytest.mark.slow
def test_the_compiler_works_within_the_block_where_it_is_needed() -> None:
    program = """
with light_imports():
    import torch
    print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
    import bitsandbytes
print(torch._dynamo is sys.modules["torch._dynamo"], torch._dynamo.__file__ is not None)
"""
    assert run(program).split() == ["2.0", "True", "True"]


def test_a_block_changes_nothing_if_the_compiler_is_imported() -> None:
    program = """
import torch._dynamo
before = torch._dynamo
with light_imports():
    print(torch.distributed.is_available(), torch._dynamo is before)
"""
    assert run(program) == "True True"


@pytest.mark.slow
def test_other_versions_import_the_compiler_as_they_like() -> None:
    program = """
from adaplex.model import light_imports as module
module.TESTED["torch"] = "0."
import torch.compiler
disable = torch.compiler.disable
with light_imports():
    print(torch.compiler.disable is disable, torch.distributed.is_available())
"""
    assert run(program).split() == ["True", "True"]


def test_the_tested_versions_are_those_that_are_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for name, version in light_imports.TESTED.items():
        assert any(pin.startswith(f"{name}=={version}") for pin in pins)
