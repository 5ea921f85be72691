"""The JSON document of a NameRecord, as catalogs store it.

A version's traits lie flat beside its other fields, where documents had them before AdapterTraits.
"""

from __future__ import annotations

from typing import Any

import pydantic_core
from pydantic import TypeAdapter

from adaplex.adapters.errors import CatalogCorrupt
from adaplex.adapters.storage.name_record import NameRecord

VERSION_FIELDS = (
    *("number", "digest", "family", "modules", "max_rank", "stored_bytes", "packed_bytes"),
    *("created", "actor", "source", "base", "signer", "warnings"),
    *("leading", "invocation", "merged_only"),
)
"""Fields of a version in the document, in their order."""
_RECORD = TypeAdapter(NameRecord)


def to_json(record: NameRecord) -> bytes:
    """Returns the document of a record."""
    fields = _RECORD.dump_python(record, mode="json")
    fields["versions"] = [_flattened(version) for version in fields["versions"]]
    return pydantic_core.to_json(fields)


def from_json(document: bytes | str) -> NameRecord:
    """Returns the record of a document. Raises CatalogCorrupt for invalid documents."""
    try:
        fields = pydantic_core.from_json(document)
        # pydantic ignores fields that a class does not have
        versions = [{**version, "traits": version} for version in fields.get("versions", ())]
        return _RECORD.validate_python({**fields, "versions": versions})
    except (ValueError, TypeError, AttributeError) as error:
        raise CatalogCorrupt(f"a record of the catalog cannot be read: {error}") from error


def _flattened(version: dict[str, Any]) -> dict[str, Any]:
    found = version | version["traits"]
    return {name: found[name] for name in VERSION_FIELDS}
