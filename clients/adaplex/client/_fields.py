"""Fields of any message: set from values, and read into the dataclass that has the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message

from adaplex.client.errors import InvalidArgument

T = TypeVar("T")
M = TypeVar("M", bound=Message)


def request(kind: type[M], **values: Any) -> M:
    """A flat message. InvalidArgument names the field that cannot hold its value."""
    message = kind()
    for name, value in values.items():
        put(message, name, value, "")
    return message


def put(message: Message, name: str, value: Any, within: str) -> None:
    """Sets a field, or fills a repeated one; says which field cannot hold its value.

    `within` is the path of the message, with its dot, as the server writes paths.
    """
    try:
        if message.DESCRIPTOR.fields_by_name[name].is_repeated:
            getattr(message, name).extend([value] if isinstance(value, str) else value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument.because(within + name, str(error)) from error


def put_map(message: Message, name: str, values: Mapping[str, str], within: str) -> None:
    """Fills a map field; says which key or value it cannot hold."""
    for key, value in values.items():
        try:
            getattr(message, name)[key] = value
        except (TypeError, ValueError) as error:
            raise InvalidArgument.because(f"{within}{name}[{key!r}]", str(error)) from error


def flat(kind: type[T], message: Message, **converted: Any) -> T:
    """A dataclass from the message fields of the same names, but for those already converted."""
    # T is one of our dataclasses; there is no bound that says so.
    names = [field.name for field in fields(kind) if field.name not in converted]  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **converted)
