"""The arguments and results of calls: frozen dataclasses without protobuf.

Values of ServerService are defined here, those of adapters in adapter_types.py and those of
generations in generation_types.py. Field names are those of protos/adaplex/v1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from adaplex.client.adapter_types import Adapter as Adapter
from adaplex.client.adapter_types import AdapterDetails as AdapterDetails
from adaplex.client.adapter_types import AdapterEvent as AdapterEvent
from adaplex.client.adapter_types import AdapterReport as AdapterReport
from adaplex.client.adapter_types import AdapterVersion as AdapterVersion
from adaplex.client.adapter_types import AliasTarget as AliasTarget
from adaplex.client.adapter_types import MergeOptions as MergeOptions
from adaplex.client.adapter_types import ModuleReport as ModuleReport
from adaplex.client.adapter_types import Refusal as Refusal
from adaplex.client.adapter_types import ResidencyTier as ResidencyTier
from adaplex.client.adapter_types import UploadResult as UploadResult
from adaplex.client.adapter_types import Validation as Validation
from adaplex.client.adapter_types import Weighted as Weighted
from adaplex.client.generation_types import AdapterMode as AdapterMode
from adaplex.client.generation_types import AppliedAdapter as AppliedAdapter
from adaplex.client.generation_types import AppliedComponent as AppliedComponent
from adaplex.client.generation_types import ChatMessage as ChatMessage
from adaplex.client.generation_types import Delta as Delta
from adaplex.client.generation_types import Finished as Finished
from adaplex.client.generation_types import FinishReason as FinishReason
from adaplex.client.generation_types import GenerateOptions as GenerateOptions
from adaplex.client.generation_types import Generation as Generation
from adaplex.client.generation_types import GenerationEvent as GenerationEvent
from adaplex.client.generation_types import Prompt as Prompt
from adaplex.client.generation_types import SamplingFields as SamplingFields
from adaplex.client.generation_types import SamplingParams as SamplingParams
from adaplex.client.generation_types import Started as Started
from adaplex.client.generation_types import Timing as Timing
from adaplex.client.generation_types import TokenLogprob as TokenLogprob
from adaplex.client.generation_types import TopLogprob as TopLogprob
from adaplex.client.generation_types import Usage as Usage


class Health(StrEnum):
    """The health that a server reports."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"


@dataclass(frozen=True)
class AdaptableModule:
    """A module of the base that an adapter may change. `kind` is `linear` or `norm`; `is_head` is
    True for the output layer, which PEFT's `all-linear` leaves out.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    is_head: bool


@dataclass(frozen=True)
class BaseModelInfo:
    """The resident base model.

    `quantization` is nf4, int8, int4-group, bf16 or fp32; in int4-group `group_size` inputs share a
    scale, else it is 0. `digest` identifies config and weights as loaded, `fingerprint` the same
    however they are quantized. A decode step reads `step_weight_bytes` of the `weight_bytes`.
    `kv_token_bytes` is the size of a token in the KV cache. Token ids are below `vocab_size`.
    """

    name: str
    architecture: str
    quantization: str
    group_size: int
    compute_dtype: str
    device: str
    digest: str
    fingerprint: str
    weight_bytes: int
    step_weight_bytes: int
    kv_token_bytes: int
    max_model_len: int
    vocab_size: int
    modules: tuple[AdaptableModule, ...]


@dataclass(frozen=True)
class Capacity:
    """The server's load, and the use of its memory and store.

    `adapters_resident` counts adapters in device memory. `store_bytes_total` is the store's quota,
    `pinned_bytes_total` the bound of pinned bytes in the arena.
    """

    requests_running: int
    requests_waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_block_tokens: int
    arena_bytes_total: int
    arena_bytes_used: int
    adapters_stored: int
    adapters_resident: int
    merged_bytes_total: int
    merged_bytes_used: int
    host_bytes_total: int
    host_bytes_used: int
    store_bytes_total: int
    store_bytes_used: int
    pinned_bytes_total: int
    pinned_bytes_used: int


@dataclass(frozen=True)
class Limits:
    """The greatest requests, queue and adapters that the server accepts."""

    max_concurrent_sequences: int
    max_waiting_requests: int
    max_adapter_bytes: int
    max_adapter_rank: int
    max_chunk_bytes: int


@dataclass(frozen=True)
class ServerInfo:
    """The server's version, base model, load, limits and uptime."""

    version: str
    model: BaseModelInfo
    capacity: Capacity
    limits: Limits
    uptime_seconds: float
