"""protos/API.md, from the descriptors and comments of the .proto files."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

from tools.docs.markdown import anchor, code, page, table

PROTOS = Path(__file__).parents[3] / "protos"
FILES = ("generation.proto", "adapters.proto", "server.proto")
PACKAGE = ".adaplex.v1."
MESSAGE, ENUM, SERVICE = 4, 5, 6
"""Field numbers of FileDescriptorProto, which begin the paths of comments."""
CHILD = 2
"""Field number of fields in a message, values in an enum, methods in a service."""
INTRO = """\
The gRPC services of package `adaplex.v1`. An absent `optional` field means the default that its
comment names. Health (`grpc.health.v1`) and reflection are served too.
[server/ERRORS.md](../server/ERRORS.md) lists the errors."""


def document() -> str:
    """Returns the page."""
    source = "protos/adaplex/v1/*.proto"
    return page("API", INTRO, source, (part for file in _files() for part in file.sections()))


class ProtoFile:
    """One .proto file with its comments."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file

    def sections(self) -> Iterator[str]:
        """Yields the services of the file, then its messages and enums in order."""
        for index, service in enumerate(self._file.service):
            rows = [
                self._method(method, (SERVICE, index, CHILD, at))
                for at, method in enumerate(service.method)
            ]
            comment = self.comment((SERVICE, index))
            rpcs = table(("RPC", "request", "response", "meaning"), rows)
            yield f"## {service.name}\n\n{comment}\n\n{rpcs}"
        for index, message in enumerate(self._file.message_type):
            yield self._message(message, index)
        for index, enum in enumerate(self._file.enum_type):
            yield self._enum(enum, index)

    def comment(self, path: Sequence[int]) -> str:
        """Returns the comment before an element, on one line."""
        return self._comments.get(tuple(path), "")

    @cached_property
    def _comments(self) -> dict[tuple[int, ...], str]:
        return {
            tuple(location.path): " ".join(location.leading_comments.split())
            for location in self._file.source_code_info.location
            if location.leading_comments
        }

    def _method(self, method: MethodDescriptorProto, path: Sequence[int]) -> tuple[str, ...]:
        request = ("stream " if method.client_streaming else "") + _link(method.input_type)
        response = ("stream " if method.server_streaming else "") + _link(method.output_type)
        return code(method.name), request, response, self.comment(path)

    def _message(self, message: DescriptorProto, index: int) -> str:
        parts = [f"### {message.name}", self.comment((MESSAGE, index))]
        rows = [
            self._field(message, field, (MESSAGE, index, CHILD, at))
            for at, field in enumerate(message.field)
        ]
        if rows:
            parts.append(table(("field", "type", "number", "meaning"), rows))
        return "\n\n".join(part for part in parts if part)

    def _field(
        self, message: DescriptorProto, field: FieldDescriptorProto, path: Sequence[int]
    ) -> tuple[str, ...]:
        comment = self.comment(path)
        if field.HasField("oneof_index") and not field.proto3_optional:
            group = f"One of `{message.oneof_decl[field.oneof_index].name}`."
            comment = f"{group} {comment}".strip()
        return code(field.name), _type(message, field), str(field.number), comment

    def _enum(self, enum: EnumDescriptorProto, index: int) -> str:
        parts = [f"### {enum.name}", self.comment((ENUM, index))]
        rows = [
            (code(value.name), str(value.number), self.comment((ENUM, index, CHILD, at)))
            for at, value in enumerate(enum.value)
        ]
        parts.append(table(("value", "number", "meaning"), rows))
        return "\n\n".join(part for part in parts if part)


def _files() -> list[ProtoFile]:
    """Compiles the .proto files to descriptors with comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"),
                *("--include_source_info", f"--descriptor_set_out={out}"),
                *(str(PROTOS / "adaplex" / "v1" / name) for name in FILES),
            ],
            check=True,
        )
        found = FileDescriptorSet.FromString(out.read_bytes())
    return [ProtoFile(file) for file in found.file]


def _type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """Returns the type of a field as .proto files write it, linked to its section."""
    entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    entry = entries.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = (_type(entry, each) for each in entry.field)
        return f"map of {key} to {value}"
    kinds = FieldDescriptorProto.Type
    scalar = kinds.Name(field.type).removeprefix("TYPE_").lower()
    name = _link(field.type_name) if field.type_name else scalar
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(type_name: str) -> str:
    if not type_name.startswith(PACKAGE):
        return type_name.removeprefix(".")
    name = type_name.removeprefix(PACKAGE)
    return f"[{name}]({anchor(name)})"
