"""Conversion between protobuf messages and dataclasses with fields of the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message

from adaplex.client.errors import InvalidArgument

T = TypeVar("T")
M = TypeVar("M", bound=Message)


def build_message(kind: type[M], **values: Any) -> M:
    """Builds a message from its fields. Raises InvalidArgument naming a field that cannot hold its
    value.
    """
    message = kind()
    for name, value in values.items():
        set_field(message, name, value, "")
    return message


def set_field(message: Message, name: str, value: Any, within: str) -> None:
    """Sets a field, or extends a repeated one.

    `within` is the path of the message with a trailing dot, as the server's errors have it. Raises
    InvalidArgument naming the field if it cannot hold the value.
    """
    try:
        if message.DESCRIPTOR.fields_by_name[name].is_repeated:
            getattr(message, name).extend([value] if isinstance(value, str) else value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument.because(within + name, str(error)) from error


def set_map_field(message: Message, name: str, values: Mapping[str, str], within: str) -> None:
    """Fills a map field. Raises InvalidArgument naming the key whose entry it cannot hold."""
    for key, value in values.items():
        try:
            getattr(message, name)[key] = value
        except (TypeError, ValueError) as error:
            raise InvalidArgument.because(f"{within}{name}[{key!r}]", str(error)) from error


def dataclass_from(kind: type[T], message: Message, **converted: Any) -> T:
    """Builds a dataclass from a message's fields of the same names and the `converted` ones."""
    # T is a dataclass, for which typing has no bound.
    names = [field.name for field in fields(kind) if field.name not in converted]  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **converted)
