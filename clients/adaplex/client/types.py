"""What goes into a call and what comes out of it: frozen values, no protobuf.

Those of adapters and of generations have files of their own; those of the server are here. Field
names are those of protos/adaplex/v1.
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
    """What the server says of its own readiness."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"


@dataclass(frozen=True)
class AdaptableModule:
    """A module of the base that an adapter may change. `kind` is `linear` or `norm`."""

    name: str
    kind: str
    in_features: int
    out_features: int
    is_head: bool


@dataclass(frozen=True)
class BaseModelInfo:
    """The resident base model. A decode step reads `step_weight_bytes` of its `weight_bytes`;
    `group_size` inputs share a scale where it is kept as `int4-group`, else it is 0.
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
    """How full the server is."""

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
    """What the server accepts."""

    max_concurrent_sequences: int
    max_waiting_requests: int
    max_adapter_bytes: int
    max_adapter_rank: int
    max_chunk_bytes: int


@dataclass(frozen=True)
class ServerInfo:
    """What the server is and how full it is."""

    version: str
    model: BaseModelInfo
    capacity: Capacity
    limits: Limits
    uptime_seconds: float
