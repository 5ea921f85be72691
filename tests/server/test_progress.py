from __future__ import annotations

import pytest
import structlog

from adaplex.server.progress import PhaseTimes, report_progress


def test_the_summary_has_the_seconds_of_each_phase() -> None:
    now = 100.0
    times = PhaseTimes(lambda: now)
    for line, spent in (
        ("importing torch and transformers", 9.64),
        ("a fallback: for a reason", 0.01),
        ("sizing the KV cache: 12 blocks, each of 16 tokens", 1.0),
        ("warming up", 5.0),
    ):
        times.begin(line)
        now += spent
    assert times.summary() == (
        "loaded in 15.7 s: importing torch and transformers 9.6, sizing the KV cache 1.0, "
        "warming up 5.0"
    )


def test_each_phase_is_logged_and_then_their_seconds() -> None:
    with structlog.testing.capture_logs() as lines, report_progress() as progress:
        progress("one")
        progress("two")
    assert [line["event"] for line in lines][:2] == ["one", "two"]
    assert lines[2]["event"].startswith("loaded in 0.0 s: ")


def test_a_start_that_fails_has_no_summary() -> None:
    def fail() -> None:
        with report_progress() as progress:
            progress("one")
            raise OSError("no disk")

    with structlog.testing.capture_logs() as lines, pytest.raises(OSError, match="no disk"):
        fail()
    assert [line["event"] for line in lines] == ["one"]
