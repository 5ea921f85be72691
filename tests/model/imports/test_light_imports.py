"""A start does without torch's compiler, which can be imported nevertheless."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adaplex.model.base.source import default_cache
from adaplex.model.imports import light_imports

ROOT = Path(__file__).parents[3]
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp")
META = ("torch._meta_registrations", "torch._decomp", "torch._refs", "torch._prims")
"""Python's kernels for tensors without data, and what importing them imports."""
BEGIN = f"""
import sys
from functools import partial
from pathlib import Path
from adaplex.model.imports import light_imports as module
from adaplex.model.imports.stand_ins import StandIn
HEAVY, META = {HEAVY}, {META}
light_imports = partial(module.light_imports, Path({str(default_cache())!r}))
def imported(names):
    return [n for n in names if n in sys.modules and not isinstance(sys.modules[n], StandIn)]
"""


def run(program: str) -> str:
    """Runs a program in a process of its own and returns what it prints."""
    ran = subprocess.run([sys.executable, "-c", BEGIN + program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.slow
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
    build(ServerConfig(**settings, kv_cache_bytes="1MiB"), lambda line: None)
print(imported(HEAVY), imported(META))
"""
    assert run(program) == f"[] {[*META]}"  # from the checkpoint
    assert run(program) == "[] []"  # from what was saved


def test_the_module_of_a_frame_is_the_one_that_inspect_finds() -> None:
    frame = sys._getframe()
    for subject in (frame, frame.f_back, Path, Path.exists):
        found = inspect.getmodule(subject)
        assert found is not None
        assert light_imports._module_of(subject) is found


def test_no_garbage_is_searched_within_the_block_and_after_it_as_before() -> None:
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with light_imports.without_collections():
                assert not gc.isenabled()
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


@pytest.mark.slow
def test_the_compiler_works_after_the_block() -> None:
    program = """
with light_imports():
    import transformers.masking_utils
import torch
assert not imported(HEAVY)
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


@pytest.mark.slow
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
