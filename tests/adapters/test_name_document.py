from __future__ import annotations

from dataclasses import replace

import pytest

from adaplex.adapters.errors import AdapterError
from adaplex.adapters.program.traits import AdapterTraits
from adaplex.adapters.storage.alias_split import Target, checked_split
from adaplex.adapters.storage.name_document import from_json, to_json
from adaplex.adapters.storage.name_record import NameRecord
from adapters.entries import digest, entry, origin, version

WRITTEN_BEFORE_TRAITS = (
    r'{"name":"poet","last_version":3,"versions":[{"number":1,"digest":"#0",'
    r'"family":"lora","modules":4,"max_rank":8,"stored_bytes":1000,'
    r'"packed_bytes":{"2":640,"4":1280},"created":"2026-01-01T00:00:00Z",'
    r'"actor":"ada","source":"upload","base":"","signer":"","warnings":[],"leading":0,'
    r'"invocation":[],"merged_only":false},{"number":2,"digest":"#1",'
    r'"family":"lora","modules":4,"max_rank":8,"stored_bytes":1000,'
    r'"packed_bytes":{"2":640,"4":1280},"created":"2026-01-01T00:01:00Z",'
    r'"actor":"ada","source":"upload","base":"sha256:ba","signer":"0123456789abcdef",'
    r'"warnings":["küche"],"leading":5,"invocation":[],"merged_only":true},{"number":3,'
    r'"digest":"#2","family":"lora","modules":4,"max_rank":8,"stored_bytes":1000,'
    r'"packed_bytes":{"2":640,"4":1280},"created":"2026-01-01T00:02:00Z",'
    r'"actor":"ada","source":"upload","base":"","signer":"","warnings":[],"leading":0,'
    r'"invocation":[7,8],"merged_only":false}],'
    r'"aliases":{"prod":[{"version":1,"weight":0.25},{"version":2,"weight":1e-7}]},'
    r'"description":"ein \"Dichter\"","labels":{"team":"a"},"pinned":true,"history":['
    r'{"time":"2026-01-01T00:00:00Z","kind":"upload","version":1,"digest":"#0","alias":"",'
    r'"before":[],"after":[],"actor":"ada","source":"upload","detail":""},'
    r'{"time":"2026-01-01T00:01:00Z","kind":"upload","version":2,"digest":"#1","alias":"",'
    r'"before":[],"after":[],"actor":"ada","source":"upload","detail":""},'
    r'{"time":"2026-01-01T00:02:00Z","kind":"upload","version":3,"digest":"#2","alias":"",'
    r'"before":[],"after":[],"actor":"ada","source":"upload","detail":""},'
    r'{"time":"2026-01-01T00:09:00Z","kind":"alias","version":0,"digest":"","alias":"prod",'
    r'"before":[],"after":[{"version":1,"weight":0.25},{"version":2,"weight":1e-7}],'
    r'"actor":"ada","source":"","detail":""},{"time":"2026-01-01T00:10:00Z",'
    r'"kind":"update","version":0,"digest":"","alias":"","before":[],"after":[],'
    r'"actor":"ada","source":"","detail":"description, labels, pinned"}]}'
).replace("#", digest(0)[:-1])
"""A document as versions before AdapterTraits wrote it."""


def poet() -> NameRecord:
    """The record that was written into the document above."""
    leading = AdapterTraits(modules=4, max_rank=8, leading=5, merged_only=True)
    invoked = AdapterTraits(modules=4, max_rank=8, invocation=(7, 8))
    doubtful = version(1, warnings=("küche",), base="sha256:ba", signer="0123456789abcdef")
    made = entry("poet").add(replace(doubtful, traits=leading), max_versions=9)
    made = made.add(version(2, traits=invoked), max_versions=9)
    made = made.set_alias("prod", checked_split([Target(1, 0.25), Target(2, 1e-7)]), origin(9))
    words = 'ein "Dichter"'
    return made.update_metadata(origin(10), description=words, labels={"team": "a"}, pinned=True)


def test_documents_from_before_traits_are_read_and_written_as_they_were() -> None:
    assert from_json(WRITTEN_BEFORE_TRAITS) == poet()
    assert to_json(poet()).decode() == WRITTEN_BEFORE_TRAITS


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"name": "a", "versions": null}',
        b'{"name": "a", "versions": [3]}',
        b'{"name": "a", "versions": [{"number": 1}]}',
    ],
)
def test_an_invalid_document_is_an_error(document: bytes) -> None:
    with pytest.raises(AdapterError, match="cannot be read"):
        from_json(document)


def test_a_document_gives_the_entry_back() -> None:
    a = entry(versions=3).set_alias(
        "prod", checked_split([Target(1, 0.1), Target(3, 0.2)]), origin()
    )
    a = a.update_metadata(origin(), description="x", labels={"team": "blue", "ü": "ß"}, pinned=True)
    assert from_json(to_json(a)) == a
    assert from_json(to_json(a.remove(origin()))) == a.remove(origin())
    with pytest.raises(AdapterError, match="cannot be read"):
        from_json(b'{"name": 3}')
