"""adaplex.client: clients of an adaplex server, blocking (Client) and for asyncio (AsyncClient).

A name is imported when it is first used: neither client imports the other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaplex.client.adapter_types import (
        Adapter,
        AdapterDetails,
        AdapterEvent,
        AdapterReport,
        AdapterVersion,
        AliasTarget,
        MergeOptions,
        ModuleReport,
        Refusal,
        ResidencyTier,
        UploadResult,
        Validation,
    )
    from adaplex.client.adapters import Adapters
    from adaplex.client.aio import AsyncClient, AsyncGenerationStream
    from adaplex.client.aio_adapters import AsyncAdapters
    from adaplex.client.client import Client, GenerationStream
    from adaplex.client.errors import (
        AdaplexClientError,
        AlreadyExists,
        Cancelled,
        DeadlineExceeded,
        FailedPrecondition,
        FieldViolation,
        Internal,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
        Unimplemented,
    )
    from adaplex.client.generation_types import (
        AdapterMode,
        AppliedAdapter,
        AppliedComponent,
        ChatMessage,
        Delta,
        Finished,
        FinishReason,
        GenerateOptions,
        Generation,
        GenerationEvent,
        Prompt,
        SamplingParams,
        Started,
        Timing,
        TokenLogprob,
        TopLogprob,
        Usage,
    )
    from adaplex.client.types import (
        AdaptableModule,
        BaseModelInfo,
        Capacity,
        Health,
        Limits,
        ServerInfo,
    )

__all__ = [
    "AdaplexClientError",
    "AdaptableModule",
    "Adapter",
    "AdapterDetails",
    "AdapterEvent",
    "AdapterMode",
    "AdapterReport",
    "AdapterVersion",
    "Adapters",
    "AliasTarget",
    "AlreadyExists",
    "AppliedAdapter",
    "AppliedComponent",
    "AsyncAdapters",
    "AsyncClient",
    "AsyncGenerationStream",
    "BaseModelInfo",
    "Cancelled",
    "Capacity",
    "ChatMessage",
    "Client",
    "DeadlineExceeded",
    "Delta",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "Generation",
    "GenerationEvent",
    "GenerationStream",
    "Health",
    "Internal",
    "InvalidArgument",
    "Limits",
    "MergeOptions",
    "ModuleReport",
    "NotFound",
    "PermissionDenied",
    "Prompt",
    "Refusal",
    "ResidencyTier",
    "ResourceExhausted",
    "SamplingParams",
    "ServerInfo",
    "Started",
    "Timing",
    "TokenLogprob",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UploadResult",
    "Usage",
    "Validation",
]

_PUBLIC = {
    "adapter_types": "Adapter AdapterDetails AdapterEvent AdapterReport AdapterVersion AliasTarget "
    "MergeOptions ModuleReport Refusal ResidencyTier UploadResult Validation",
    "adapters": "Adapters",
    "aio": "AsyncClient AsyncGenerationStream",
    "aio_adapters": "AsyncAdapters",
    "client": "Client GenerationStream",
    "errors": "AdaplexClientError AlreadyExists Cancelled DeadlineExceeded FailedPrecondition "
    "FieldViolation Internal InvalidArgument NotFound PermissionDenied ResourceExhausted "
    "Unauthenticated Unavailable Unimplemented",
    "generation_types": "AdapterMode AppliedAdapter AppliedComponent ChatMessage Delta Finished "
    "FinishReason GenerateOptions Generation GenerationEvent Prompt SamplingParams Started Timing "
    "TokenLogprob TopLogprob Usage",
    "types": "AdaptableModule BaseModelInfo Capacity Health Limits ServerInfo",
}
"""Module -> public names that it defines."""
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Returns a public name, or one of the modules, which is imported first."""
    if name in _PUBLIC:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
