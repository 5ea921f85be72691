from __future__ import annotations

import os
import socket

import pytest

from adaplex.client.bench.machine import Machine, cores, read_bandwidth
from adaplex.client.bench.process import ProcessMonitor, listening_pid
from adaplex.client.bench.roofline import Roofline, StepBytes
from adaplex.client.types import BaseModelInfo


def model(*, step_weight_bytes: int, kv_token_bytes: int) -> BaseModelInfo:
    return BaseModelInfo(
        name="m",
        architecture="llama",
        quantization="nf4",
        group_size=0,
        compute_dtype="bfloat16",
        device="cpu",
        digest="",
        fingerprint="",
        weight_bytes=2 * step_weight_bytes,
        step_weight_bytes=step_weight_bytes,
        kv_token_bytes=kv_token_bytes,
        max_model_len=100,
        vocab_size=10,
        modules=(),
    )


def test_a_step_reads_weights_once_each_adapter_once_and_the_kv_of_every_row() -> None:
    step = StepBytes.of(
        model(step_weight_bytes=1000, kv_token_bytes=3), [10, 20], rows=4, context=50.5
    )
    assert (step.weights, step.adapters, step.kv) == (1000, 30, 606)
    assert step.total == 1636


@pytest.mark.parametrize(("rows", "expected"), [(1, 986), (8, 6004), (32, 13207), (64, 16507)])
def test_the_floor_of_an_8b_model_is_the_published_arithmetic(rows: int, expected: float) -> None:
    """Llama-3.1-8B in nf4 on an H200: rank 16 on all linears, context 1,024, an adapter a row."""
    llama = model(step_weight_bytes=4_650_000_000, kv_token_bytes=128 << 10)
    step = StepBytes.of(llama, [83_900_000] * rows, rows=rows, context=1024)
    found = Roofline.of(step, bandwidth=4.8e12, measured=10.0)
    assert rows * 1e3 / found.floor == pytest.approx(expected, rel=0.01)
    assert found.share == pytest.approx(found.floor / 10.0)


def test_the_bandwidth_of_this_machine_is_a_bandwidth() -> None:
    assert 1e8 < read_bandwidth(8 << 20, threads=2, repeats=2) < 1e13
    here = Machine.here(None)
    assert here.cores == cores() >= 1
    assert here.processor


def test_usage_has_processor_time_and_memory() -> None:
    with ProcessMonitor(os.getpid()).measure() as found:
        assert found == []
        ballast = bytearray(os.urandom(1 << 20)) * 64
    assert 0 < found[0].cores <= 64
    assert found[0].peak_bytes > len(ballast)
    assert found[0].client_cores == pytest.approx(found[0].cores, rel=0.5)


def test_a_listener_is_found_by_its_port() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        with pytest.raises(LookupError, match=f"no process of this user listens on port {port}"):
            listening_pid(port)
        listening.listen()
        assert listening_pid(port) == os.getpid()


def test_a_missing_process_is_a_lookup_error() -> None:
    with pytest.raises(LookupError):
        ProcessMonitor(2**31 - 1)
