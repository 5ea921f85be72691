"""The one table from our errors to gRPC statuses, with the cause and the remedy of each."""

from __future__ import annotations

from dataclasses import dataclass

from grpc import StatusCode

from adaplex.adapters import errors as adapters
from adaplex.engine import errors as engine
from adaplex.model import errors as model
from adaplex.server import errors as edge


@dataclass(frozen=True)
class Mapping:
    """Status of a class of errors. `cause` and `remedy` are documented in server/ERRORS.md."""

    code: StatusCode
    reason: str
    """The `reason` of google.rpc.ErrorInfo, for programs."""
    cause: str
    remedy: str


REPORT = "Report it with the log lines of the request id: no client should see this class."

TABLE: dict[type[BaseException], Mapping] = {
    adapters.AdapterInvalid: Mapping(
        StatusCode.INVALID_ARGUMENT,
        "ADAPTER_INVALID",
        "The checkpoint cannot be served on this base: a config field, a tensor, a hash or the "
        "signature is refused, or the adapters of a request cannot be mixed.",
        "Read the field violations, which list every refusal; `adaplex adapters verify` checks a "
        "directory without a server, `adaplex adapters formats` lists what is served.",
    ),
    adapters.AdapterNotFound: Mapping(
        StatusCode.NOT_FOUND,
        "ADAPTER_NOT_FOUND",
        "No adapter has the requested name, version, alias or digest.",
        "List the names with `adaplex adapters ls` and upload the adapter, or let `resolve_from` "
        "find it on first use.",
    ),
    adapters.AdapterExists: Mapping(
        StatusCode.ALREADY_EXISTS,
        "ADAPTER_EXISTS",
        "The name already stands for other content, or is the base model's.",
        "Send UPLOAD_POLICY_REPLACE to add a version, or choose another name.",
    ),
    adapters.BaseMismatch: Mapping(
        StatusCode.FAILED_PRECONDITION,
        "BASE_MISMATCH",
        "The stored adapter was checked against another base model than the one served, and "
        "`base_policy` is `refuse`.",
        "Serve the base that the adapter was trained on, upload the adapter again, or set "
        "`base_policy` to `warn`.",
    ),
    adapters.StoreFull: Mapping(
        StatusCode.RESOURCE_EXHAUSTED,
        "STORE_FULL",
        "A quota of the store (`max_adapters`, `max_versions`, `max_store_bytes`) or its disk is "
        "used up.",
        "Delete adapters or versions, or raise the quota; then upload again.",
    ),
    adapters.AdapterTooLarge: Mapping(
        StatusCode.INVALID_ARGUMENT,
        "ADAPTER_TOO_LARGE",
        "The adapter exceeds a limit: bytes of its files (`max_adapter_bytes`), its rank "
        "(`max_adapter_rank`), or the whole arena (`arena_bytes`).",
        "Raise the limit that the message names, or train a smaller adapter.",
    ),
    adapters.SourceUnavailable: Mapping(
        StatusCode.UNAVAILABLE,
        "SOURCE_UNAVAILABLE",
        "The hub or the bucket that holds the adapter cannot be reached, or answers with an error.",
        "Check network, credentials and address from the server's machine; try again after the "
        "delay.",
    ),
    adapters.StoreCorrupt: Mapping(
        StatusCode.DATA_LOSS,
        "STORE_CORRUPT",
        "Stored files are missing or do not match the digest that they are stored under.",
        "Upload the same adapter again, which repairs it; `adaplex adapters fsck` lists everything "
        "damaged.",
    ),
    adapters.CatalogCorrupt: Mapping(
        StatusCode.DATA_LOSS,
        "CATALOG_CORRUPT",
        "The catalog of the store, which has the names of adapters, is damaged or was removed. "
        "Health says NOT_SERVING.",
        "Stop the servers of the store and run `adaplex adapters restore`, which makes the catalog "
        "anew from the copies beside the contents; start the server again.",
    ),
    adapters.CatalogOutdated: Mapping(
        StatusCode.FAILED_PRECONDITION,
        "CATALOG_OUTDATED",
        "The catalog is new or older than the copies of its names beside the contents, so this "
        "name is not changed and nothing that it names is removed.",
        "Stop the servers of the store and run `adaplex adapters restore`.",
    ),
    engine.RequestInvalid: Mapping(
        StatusCode.INVALID_ARGUMENT,
        "REQUEST_INVALID",
        "A field of the request is missing, out of range, or does not fit the model.",
        "Correct the field that the violation names; protos/API.md gives every range.",
    ),
    engine.QueueFull: Mapping(
        StatusCode.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        "As many requests wait as `max_waiting` allows.",
        "Try again after the delay; raise `max_waiting` or `max_running`, or add a server.",
    ),
    engine.PinsFull: Mapping(
        StatusCode.RESOURCE_EXHAUSTED,
        "PINS_FULL",
        "Pinned adapters would exceed `max_pinned_share` of the arena, or leave no contiguous "
        "extent for this one.",
        "Unpin another adapter, or raise `arena_bytes` or `max_pinned_share`.",
    ),
    engine.NoRoomBesidePins: Mapping(
        StatusCode.RESOURCE_EXHAUSTED,
        "NO_ROOM_BESIDE_PINS",
        "The adapter does not fit into the part of the arena that pinned adapters leave.",
        "Unpin an adapter, or raise `arena_bytes`.",
    ),
    engine.ServerUnavailable: Mapping(
        StatusCode.UNAVAILABLE,
        "SERVER_UNAVAILABLE",
        "The server is shutting down, or its engine has stopped.",
        "Send the request to another server, or try again once health says SERVING.",
    ),
    engine.DeadlineExpired: Mapping(
        StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE_EXPIRED",
        "The client's deadline passed before the request was done.",
        "Allow more time or generate fewer tokens; if requests wait in the queue, lower the load.",
    ),
    engine.LogitsOverflowed: Mapping(
        StatusCode.FAILED_PRECONDITION,
        "LOGITS_OVERFLOWED",
        "The logits of this request are not finite, most likely because its adapter overflows.",
        "Check the adapter's scale and training; a smaller weight in a mix may keep it finite.",
    ),
    engine.AdapterLoadFailed: Mapping(
        StatusCode.FAILED_PRECONDITION,
        "ADAPTER_LOAD_FAILED",
        "The stored adapter could not be loaded into memory.",
        "Read the reason in the message; check the store with `adaplex adapters fsck`.",
    ),
    engine.EngineFailed: Mapping(
        StatusCode.INTERNAL,
        "ENGINE_FAILED",
        "A step of the engine failed; the requests in it are lost.",
        "Send the request again. The server's log has the traceback under the request id.",
    ),
    edge.UploadsBusy: Mapping(
        StatusCode.RESOURCE_EXHAUSTED,
        "UPLOADS_BUSY",
        "`max_uploads` uploads, loads and merges are running.",
        "Try again after the delay, or raise `max_uploads`.",
    ),
    edge.UploadIdle: Mapping(
        StatusCode.DEADLINE_EXCEEDED,
        "UPLOAD_IDLE",
        "The client of an upload sent nothing for `upload_idle_timeout` seconds.",
        "Send the upload again without pauses, or raise `upload_idle_timeout`.",
    ),
    edge.Unauthenticated: Mapping(
        StatusCode.UNAUTHENTICATED,
        "UNAUTHENTICATED",
        "The server knows its callers (`tokens_file`), and the call shows no valid token or "
        "certificate.",
        "Send a token that `adaplex tokens create` made (`--token`, `ADAPLEX_TOKEN`), or a client "
        "certificate that it knows; `adaplex tokens list` shows which are expired or revoked.",
    ),
    edge.ScopeMissing: Mapping(
        StatusCode.PERMISSION_DENIED,
        "SCOPE_MISSING",
        "The caller's token lacks the scope that the call needs.",
        "Use a token with the scope that the message names: `adaplex tokens create --scope`.",
    ),
    edge.AuthenticationBusy: Mapping(
        StatusCode.RESOURCE_EXHAUSTED,
        "AUTHENTICATION_BUSY",
        "Too many tokens that the server has not seen before came at once.",
        "Try again after the delay; find out who sends wrong tokens.",
    ),
    edge.NoChatTemplate: Mapping(
        StatusCode.INVALID_ARGUMENT,
        "CHAT_TEMPLATE_MISSING",
        "The request has a conversation, and the model no chat template to encode it.",
        "Send the prompt as text, rendered as the model was trained.",
    ),
    model.ModelError: Mapping(
        StatusCode.INTERNAL,
        "MODEL_ERROR",
        "The base model cannot be served; this ends the start, before any client can connect.",
        REPORT,
    ),
    # Roots, of which every subclass is above; a new subclass gets its root's line.
    adapters.AdapterError: Mapping(
        StatusCode.INTERNAL,
        "ADAPTER_ERROR",
        "An adapter failed without a class of its own.",
        REPORT,
    ),
    engine.RequestError: Mapping(
        StatusCode.INTERNAL, "REQUEST_ERROR", "A request failed without a class of its own.", REPORT
    ),
    adapters.AdaplexError: Mapping(
        StatusCode.INTERNAL, "ERROR", "An error of adaplex has no class of its own.", REPORT
    ),
}
UNEXPECTED = Mapping(
    StatusCode.INTERNAL,
    "INTERNAL",
    "A bug: an exception that is not one of ours. The client sees only the request id.",
    "Report it with the traceback, which the server logs under the request id.",
)

RETRIED = (
    engine.QueueFull
    | edge.UploadsBusy
    | edge.AuthenticationBusy
    | adapters.StoreFull
    | adapters.SourceUnavailable
)
"""Errors with `retry_after`, whose statuses carry a RetryInfo."""


def mapping_of(error: BaseException) -> Mapping:
    """Returns the line of the error's nearest class, UNEXPECTED if the error is not ours."""
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), UNEXPECTED)
