from __future__ import annotations

import asyncio
import signal
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from adaplex.server.app import SERVICES, channel_arguments
from adaplex.server.config import ServerConfig
from adaplex.server.errors import ConfigError
from adaplex.server.process import run
from adaplex.v1 import generation_pb2_grpc
from adaplex.v1.adapters_pb2 import ListAdaptersRequest
from adaplex.v1.generation_pb2 import (
    GenerateRequest,
    GenerateStreamRequest,
    GenerationSpec,
    SamplingParams,
)
from adaplex.v1.server_pb2 import GetServerInfoRequest
from grpc_arguments import unknown_arguments
from server.calls import status, until
from server.fake_model import BASE, FEATURES, ScriptedRunner
from server.server_rig import ServerRig, rig, toy_components

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LONG = GenerationSpec(text="x", sampling=SamplingParams(max_tokens=20, ignore_eos=True))


async def fetch(toy: ServerRig, path: str) -> tuple[int, str]:
    """Returns status and body of a page of the HTTP port."""
    url = f"http://127.0.0.1:{toy.server.http_port}{path}"

    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(get)


async def test_health_answers_for_the_server_and_each_service(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        for service in ("", *SERVICES, "liveness"):
            assert await toy.health(service) == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await toy.health("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert await fetch(toy, "/health") == (200, "serving\n")


async def test_an_engine_that_does_not_beat_is_not_alive(tmp_path: Path) -> None:
    async with rig(tmp_path, stall_timeout=0.2) as toy:
        toy.server._health._every = 0.01
        toy.runner.gate.clear()
        toy.runner.slow = 1.0
        call = asyncio.ensure_future(toy.generate(LONG))
        await until(lambda: not toy.server._health.ready)
        assert await toy.health("liveness") == NOT_SERVING
        assert await toy.health() == NOT_SERVING
        assert (await fetch(toy, "/health"))[0] == 503
        toy.runner.gate.set()
        await call
        await until(lambda: toy.server._health.ready)
        assert await toy.health() == SERVING


async def test_reflection_lists_every_service(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        stub = reflection_pb2_grpc.ServerReflectionStub(toy.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= names


async def test_info_tells_what_the_server_is(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("a")
        await toy.generate("x", adapter="a")
        info = await toy.info.GetServerInfo(GetServerInfoRequest())
    assert info.model.name == "toy"
    assert info.model.max_model_len == 256
    assert [m.name for m in info.model.modules] == list(BASE.modules)
    assert {(m.kind, m.in_features, m.is_head) for m in info.model.modules} == {
        ("linear", FEATURES, False)
    }
    assert info.capacity.kv_blocks_total == 64
    assert info.capacity.arena_bytes_total == 1 << 16
    assert info.capacity.adapters_stored == 1
    assert info.capacity.adapters_resident == 1
    assert info.limits.max_concurrent_sequences == 4
    assert info.limits.max_chunk_bytes == 1 << 20
    assert info.uptime_seconds > 0


def test_grpc_knows_every_argument_of_the_server() -> None:
    assert unknown_arguments(channel_arguments(ServerConfig())) == []
    assert unknown_arguments([("grpc.http2.min_recv_ping_interval_without_data_ms", 1)])


def test_pings_every_ten_seconds_are_not_too_many() -> None:
    arguments = dict(channel_arguments(ServerConfig()))
    assert arguments["grpc.keepalive_permit_without_calls"] == 1
    assert arguments["grpc.http2.min_ping_interval_without_data_ms"] < 10_000


async def test_a_drain_finishes_what_runs_and_takes_nothing_new(tmp_path: Path) -> None:
    runner = ScriptedRunner()
    async with rig(tmp_path, runner=runner) as toy:
        runner.gate.clear()
        running = asyncio.ensure_future(toy.generate(LONG))
        await until(lambda: toy.engine.stats().running == 1)
        drain = asyncio.ensure_future(toy.server.drain(asyncio.Event()))
        await until(lambda: toy.server._edge.draining)
        assert await toy.health() == NOT_SERVING
        assert await toy.health("liveness") == SERVING
        assert await fetch(toy, "/health") == (503, "not serving\n")
        for call in (
            toy.generate(LONG),
            toy.adapters.ListAdapters(ListAdaptersRequest()),
        ):
            code, details = await status(call)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert details["ErrorInfo"].reason == "SERVER_UNAVAILABLE"
        assert not drain.done()
        runner.gate.set()
        assert len((await running).token_ids) == 20
        await asyncio.wait_for(drain, 5)


async def test_a_drain_ends_when_its_time_is_up(tmp_path: Path) -> None:
    async with rig(tmp_path, shutdown_timeout=0.05) as toy:
        toy.runner.gate.clear()
        call = toy.generate(LONG)
        running = asyncio.ensure_future(call)
        await until(lambda: toy.engine.stats().running == 1)
        await toy.server.drain(asyncio.Event())
        assert not running.done()
        await toy.server.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_a_second_signal_cuts_the_drain_short(tmp_path: Path) -> None:
    hard = asyncio.Event()
    async with rig(tmp_path, shutdown_timeout=60) as toy:
        toy.runner.gate.clear()
        running = asyncio.ensure_future(toy.generate(LONG))
        await until(lambda: toy.engine.stats().running == 1)
        drain = asyncio.ensure_future(toy.server.drain(hard))
        hard.set()
        await asyncio.wait_for(drain, 5)
        running.cancel()


async def test_sigterm_drains_and_ends_the_run(tmp_path: Path) -> None:
    runner = ScriptedRunner()
    parts, core = toy_components(tmp_path, runner)
    with structlog.testing.capture_logs() as lines:
        running = asyncio.ensure_future(run(parts))
        await until(lambda: any(line["event"] == "serving" for line in lines))
        target = next(line["grpc"] for line in lines if line["event"] == "serving")
        async with grpc.aio.insecure_channel(target) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            runner.gate.clear()
            call = asyncio.ensure_future(stub.Generate(GenerateRequest(spec=LONG)))  # type: ignore[arg-type]
            await until(lambda: core.stats().running == 1)
            signal.raise_signal(signal.SIGTERM)
            await until(lambda: any(line["event"] == "draining" for line in lines))
            runner.gate.set()
            assert len((await call).token_ids) == 20
            await asyncio.wait_for(running, 5)
    assert lines[-1]["event"] == "stopped"
    assert not core.has_work


@pytest.mark.parametrize("field", ["port", "http_port"])
async def test_a_port_in_use_is_refused_by_name(tmp_path: Path, field: str) -> None:
    async with rig(tmp_path / "a") as toy:
        taken = {field: getattr(toy.server, field)}
        with pytest.raises(ConfigError, match=f"{field}: cannot bind 127.0.0.1:{taken[field]}"):
            async with rig(tmp_path / "b", **taken):
                pass


async def test_metrics_hold_the_whole_table(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        await toy.upload("german")
        spec = GenerationSpec(text="hello", adapter="german")
        await toy.generate(spec)
        stream = toy.generation.GenerateStream(GenerateStreamRequest(spec=LONG))
        assert [event async for event in stream]
        await status(toy.generate(GenerationSpec()))
        code, text = await fetch(toy, "/metrics")
    assert code == 200
    lines = text.splitlines()
    families = {line.split()[2] for line in lines if line.startswith("# TYPE adaplex_")}
    assert families == {f"adaplex_{name}" for name in TABLE}
    assert not any("_created" in line for line in lines if line.startswith("adaplex_"))
    assert 'adaplex_prompt_tokens_total{model_name="toy"} 6.0' in lines
    assert 'adaplex_generation_tokens_total{model_name="toy"} 27.0' in lines
    assert 'adaplex_adapter_requests_total{adapter="german",model_name="toy"} 1.0' in lines
    assert 'adaplex_request_success_total{finished_reason="stop",model_name="toy"} 1.0' in lines
    assert 'adaplex_request_success_total{finished_reason="length",model_name="toy"} 1.0' in lines
    state = 'adaplex_adapter_state{adapter="german",model_name="toy",tier="arena"} 1.0'
    assert state in lines
    assert 'adaplex_time_to_first_token_seconds_count{model_name="toy"} 2.0' in lines
    handled = (
        'grpc_server_handled_total{grpc_code="INVALID_ARGUMENT",grpc_method="Generate",'
        'grpc_service="adaplex.v1.GenerationService",grpc_type="unary"} 1.0'
    )
    assert handled in lines
    assert any(line.startswith("grpc_server_handling_seconds_bucket") for line in lines)
    assert any('grpc_type="server_stream"' in line for line in lines)
    assert not any(line.startswith("vllm:") for line in lines)


TABLE = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "lora_requests_info",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "request_success_total",
    "admission_rejections_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
    "adapter_requests_total",
    "adapter_loads_total",
    "adapter_load_seconds",
    "adapter_evictions_total",
    "adapter_resident_bytes",
    "adapter_capacity_bytes",
    "adapter_pinned_bytes",
    "adapter_stored_bytes",
    "adapter_store_capacity_bytes",
    "adapters_stored",
    "adapter_state",
    "merged_cache_queries_total",
    "merged_cache_hits_total",
]


async def test_the_table_has_vllm_names_when_asked(tmp_path: Path) -> None:
    async with rig(tmp_path, vllm_metric_names=True) as toy:
        await toy.generate(LONG)
        _, text = await fetch(toy, "/metrics")
    lines = text.splitlines()
    assert 'vllm:generation_tokens_total{model_name="toy"} 20.0' in lines
    assert 'adaplex_generation_tokens_total{model_name="toy"} 20.0' in lines
    assert 'vllm:time_to_first_token_seconds_bucket{le="0.001",model_name="toy"}' in text
    assert 'vllm:iteration_tokens_total_bucket{le="8.0",model_name="toy"}' in text
    assert not any(line.startswith("vllm:adapter_") for line in lines)


async def test_other_pages_are_not_found(tmp_path: Path) -> None:
    async with rig(tmp_path) as toy:
        assert await fetch(toy, "/") == (404, "not found\n")
        assert (await fetch(toy, "/metrics/x"))[0] == 404
