"""Canned responses of the three services, as FakeServer returns them."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from adaplex.v1 import adapters_pb2, generation_pb2, server_pb2

DIGEST = "sha256:" + "ab" * 32
WORDS = ["The", " answer", " is", " 42", "."]


def logprob(token: int) -> generation_pb2.TokenLogprob:
    """A token's log probability, with the next token as the only likely one."""
    top = [generation_pb2.TopLogprob(token_id=token + 1, logprob=-1.5)]
    return generation_pb2.TokenLogprob(token_id=token, logprob=-0.25, top=top)


def started(spec: generation_pb2.GenerationSpec, request_id: str) -> Any:
    """The first event: version 3 of the adapter unless the spec names another."""
    message = generation_pb2.GenerationStarted(request_id=request_id, model="tiny", prompt_tokens=7)
    if spec.HasField("add_special_tokens"):
        message.warnings.append(f"special tokens: {spec.add_special_tokens}")
    if spec.adapter:
        name, _, version = spec.adapter.partition("@")
        message.adapter.name = name
        message.adapter.version = int(version or 3)
        message.adapter.digest = DIGEST
        message.adapter.mode = spec.mode or generation_pb2.ADAPTER_MODE_UNMERGED
        message.adapter.modules = 14
    elif spec.adapters:
        message.adapter.name = "+".join(part.adapter for part in spec.adapters)
        message.adapter.digest = DIGEST
        for part in spec.adapters:
            message.adapter.components.add(name=part.adapter, version=1, weight=part.weight)
    return message


def deltas(spec: generation_pb2.GenerationSpec) -> list[generation_pb2.GenerationDelta]:
    """One delta for each of WORDS."""
    wanted = spec.sampling.HasField("logprobs")
    return [
        generation_pb2.GenerationDelta(
            text=word, token_ids=[token], logprobs=[logprob(token)] if wanted else []
        )
        for token, word in enumerate(WORDS)
    ]


def finished() -> generation_pb2.GenerationFinished:
    """The last event."""
    return generation_pb2.GenerationFinished(
        reason=generation_pb2.FINISH_REASON_STOP,
        stop="</s>",
        prompt_tokens=7,
        completion_tokens=len(WORDS),
        cached_tokens=4,
        queue_seconds=0.25,
        adapter_wait_seconds=0.125,
        first_token_seconds=0.5,
        total_seconds=2.0,
    )


def event(**kind: Any) -> generation_pb2.GenerateStreamResponse:
    """A message of a stream."""
    return generation_pb2.GenerateStreamResponse(**kind)


def adapter(name: str, version: int = 1) -> adapters_pb2.Adapter:
    """A stored adapter with every field set but `signer` and `description`."""
    return adapters_pb2.Adapter(
        name=name,
        version=version,
        digest=DIGEST,
        family="lora",
        modules=2,
        max_rank=8,
        stored_bytes=3 << 20,
        packed_bytes=1 << 20,
        create_time=Timestamp(seconds=1_700_000_000, nanos=500_000_000),
        resident=version == 1,
        labels={"team": "blue"},
        aliases=[adapters_pb2.Alias(alias="default", targets=targets(95, 5))],
        source="upload",
        actor="ada",
        base_fingerprint=DIGEST,
        update_time=Timestamp(seconds=1_700_000_001),
        tier=adapters_pb2.RESIDENCY_TIER_ARENA,
        leading_tokens=12,
        invocation_tokens=[7, 8],
        merged_only=True,
    )


def targets(*weights: float) -> list[adapters_pb2.AliasTarget]:
    """Targets of an alias, from version 3 on."""
    return [adapters_pb2.AliasTarget(version=3 + i, weight=w) for i, w in enumerate(weights)]


def version(number: int) -> adapters_pb2.AdapterVersion:
    return adapters_pb2.AdapterVersion(
        version=number,
        digest=DIGEST,
        create_time=Timestamp(seconds=1_700_000_000),
        stored_bytes=3 << 20,
        source="upload",
        actor="ada",
    )


def adapter_event(kind: str) -> adapters_pb2.AdapterEvent:
    """A change of the alias `prod`."""
    return adapters_pb2.AdapterEvent(
        time=Timestamp(seconds=1_700_000_000),
        kind=kind,
        alias="prod",
        before=targets(1),
        after=targets(95, 5),
        actor="ada",
    )


def report(*refusals: tuple[str, str]) -> adapters_pb2.AdapterReport:
    """The report of a LoRA on two modules."""
    return adapters_pb2.AdapterReport(
        family="lora",
        digest=DIGEST,
        modules=[
            adapters_pb2.ModuleReport(
                module=f"model.layers.{layer}.self_attn.q_proj",
                rank=8,
                scale=2.0,
                in_features=64,
                out_features=32,
                primitives=["low-rank", "bias"],
            )
            for layer in range(2)
        ],
        packed_bytes=1 << 20,
        refusals=[adapters_pb2.Refusal(where=where, reason=why) for where, why in refusals],
        notes=["task_type has no effect"],
        prefix_tokens=8,
        virtual_tokens=4,
        invocation_tokens=[7, 8],
        merged_only=True,
        merged_bytes=3 << 20,
    )


def server_info() -> server_pb2.GetServerInfoResponse:
    return server_pb2.GetServerInfoResponse(
        version="0.1.0",
        model=server_pb2.BaseModelInfo(
            name="tiny",
            architecture="LlamaForCausalLM",
            quantization="int4-group",
            group_size=32,
            compute_dtype="bfloat16",
            device="cpu",
            digest=DIGEST,
            weight_bytes=5 << 20,
            max_model_len=2048,
            vocab_size=300,
            modules=[
                server_pb2.AdaptableModule(
                    name="lm_head", kind="linear", in_features=64, out_features=300, is_head=True
                )
            ],
        ),
        capacity=server_pb2.CapacityInfo(
            requests_running=2,
            kv_blocks_total=100,
            kv_blocks_used=9,
            store_bytes_used=1 << 20,
            store_bytes_total=4 << 20,
            host_bytes_used=2 << 20,
            host_bytes_total=8 << 20,
        ),
        limits=server_pb2.LimitsInfo(max_concurrent_sequences=16, max_adapter_rank=256),
        uptime_seconds=61.5,
    )
