from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from adaplex.server import logs
from adaplex.v1.generation_pb2 import (
    GenerationSpec,
)
from server.calls import status
from server.fake_model import ScriptedRunner
from server.server_rig import rig


@pytest.fixture
def configured_logs() -> Iterator[None]:
    """Restores the logging configuration afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    structlog.reset_defaults()
    yield
    logging.basicConfig(handlers=handlers, level=level, force=True)
    structlog.reset_defaults()


@pytest.mark.usefixtures("configured_logs")
async def test_log_lines_tell_what_happened_and_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", "json")
    async with rig(tmp_path) as toy:
        await toy.upload("german")
        spec = GenerationSpec(text="my secret", adapter="german")
        await toy.generate(spec, metadata=(("x-request-id", "r-9"),))
        await toy.health()
    written = capsys.readouterr().err
    assert "secret" not in written
    lines: list[dict[str, Any]] = [json.loads(line) for line in written.splitlines()]
    line = next(line for line in lines if line.get("request_id") == "r-9")
    assert line["code"] == "OK"
    assert line["adapter"] == "german"
    assert line["digest"].startswith("sha256:")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (9, 11)
    assert line["total_ms"] >= line["first_token_ms"] >= line["queue_ms"] >= 0
    assert not any("Health" in str(line.get("method")) for line in lines)


@pytest.mark.usefixtures("configured_logs")
@pytest.mark.parametrize("form", ["json", "console"])
async def test_a_failure_is_logged_with_its_traceback_and_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Any
) -> None:
    logs.configure("info", form)
    async with rig(tmp_path, runner=ScriptedRunner(failure=KeyError("bug"))) as toy:
        digest = (await toy.upload("german")).adapter.digest
        capsys.readouterr()  # the line of the upload
        spec = GenerationSpec(text="my secret", adapter="german")
        await status(toy.generate(spec))
    written = capsys.readouterr().err
    assert "Traceback" in written
    assert "KeyError" in written
    assert "german" in written
    assert digest in written
    assert "secret" not in written
