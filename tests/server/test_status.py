from __future__ import annotations

import base64
import importlib
import pkgutil
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2

import adaplex.adapters
import adaplex.engine
import adaplex.server
from adaplex.adapters.errors import (
    AdaplexError,
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    Refusal,
)
from adaplex.engine.errors import EngineFailed, QueueFull, RequestError
from adaplex.model.errors import ModelError
from adaplex.server.rich_status import status_of
from adaplex.server.status import TABLE, UNEXPECTED, Mapping, mapping_of

ROOTS = {AdaplexError, AdapterError, RequestError}
"""Base classes, which are never raised."""


def subclasses(kind: type[AdaplexError]) -> Iterator[type[AdaplexError]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def all_errors() -> set[type[AdaplexError]]:
    """Returns every class below AdaplexError that an `errors` module of ours defines."""
    for package in (adaplex.adapters, adaplex.engine, adaplex.server):
        for module in pkgutil.iter_modules(package.__path__):
            if module.name == "errors":
                importlib.import_module(f"{package.__name__}.errors")
    return {error for error in subclasses(AdaplexError) if error.__module__.startswith("adaplex.")}


def test_every_error_that_a_client_can_see_has_its_own_line() -> None:
    served = {error for error in all_errors() - ROOTS if not issubclass(error, ModelError)}
    assert served <= TABLE.keys()


def test_every_line_is_an_error_of_ours_with_its_own_reason() -> None:
    assert all_errors() >= TABLE.keys() - {AdaplexError}
    reasons = [mapping.reason for mapping in TABLE.values()]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("mapping", [*TABLE.values(), UNEXPECTED], ids=lambda m: m.reason)
def test_every_line_explains_itself(mapping: Mapping) -> None:
    for text in (mapping.cause, mapping.remedy):
        assert len(text.split()) >= 4
        assert text.endswith(".")


def test_what_is_not_ours_is_internal_and_says_nothing() -> None:
    status = status_of(KeyError("password"), "r-1")
    assert mapping_of(KeyError()) is UNEXPECTED
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert status.message == "internal error; request id r-1"
    assert "password" not in str(status)


def test_an_engine_failure_does_not_tell_its_cause() -> None:
    status = status_of(EngineFailed("the step failed: /srv/secret"), "r-1")
    assert "secret" not in str(status)
    assert details(status, "ErrorInfo").reason == "ENGINE_FAILED"


def details(status: object, kind: str) -> object:
    message = getattr(error_details_pb2, kind)()
    for detail in status.details:  # type: ignore[attr-defined]
        if detail.Unpack(message):
            return message
    pytest.fail(f"no {kind}")


def test_a_bad_checkpoint_lists_every_refusal() -> None:
    error = AdapterInvalid([Refusal("r", "must be positive"), Refusal("x.lora_A", "is NaN")])
    bad = details(status_of(error, "r"), "BadRequest")
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("r", "must be positive"),
        ("x.lora_A", "is NaN"),
    ]


def test_many_refusals_still_fit_into_metadata() -> None:
    error = AdapterInvalid([Refusal(f"tensor.{i}" * 10, "ü" * 2000) for i in range(1000)])
    status = status_of(error, "r")
    bad = details(status, "BadRequest")
    assert bad.field_violations[-1].description == f"{1000 - len(bad.field_violations) + 1} more"
    in_metadata = len(base64.b64encode(status.SerializeToString()))
    percent_encoded = 3 * len(status.message.encode())
    assert in_metadata + percent_encoded < 8000


def test_a_full_queue_carries_its_delay() -> None:
    status = status_of(QueueFull(10, 1.25), "r")
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert details(status, "RetryInfo").retry_delay.ToTimedelta().total_seconds() == 1.25


def test_not_found_names_the_field() -> None:
    bad = details(
        status_of(AdapterNotFound("no adapter x", field="spec.adapter"), "r"), "BadRequest"
    )
    assert [v.field for v in bad.field_violations] == ["spec.adapter"]
