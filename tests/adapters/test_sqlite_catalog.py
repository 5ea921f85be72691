from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaplex.adapters.errors import AdapterError, AdapterExists
from adaplex.adapters.storage.catalog import Order, Query
from adaplex.adapters.storage.name_record import NameRecord
from adaplex.adapters.storage.sqlite_catalog import SqliteCatalog
from adapters.entries import digest, entry, origin, version


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[SqliteCatalog]:
    made = SqliteCatalog(tmp_path / "catalog.sqlite3")
    yield made
    made.check_integrity()
    made.close()


def put(catalog: SqliteCatalog, *entries: NameRecord) -> None:
    for new in entries:
        catalog.update(new.name, lambda _, new=new: new)


def names(found: list[NameRecord]) -> list[str]:
    return [each.name for each in found]


def test_an_update_is_there_after_a_restart(tmp_path: Path) -> None:
    first = SqliteCatalog(tmp_path / "c")
    put(first, entry("a", 3).update_metadata(origin(), labels={"k": "v"}))
    first.close()
    second = SqliteCatalog(tmp_path / "c")
    assert second.get("a") == entry("a", 3).update_metadata(origin(), labels={"k": "v"})
    assert second.get("b") is None
    second.check_integrity()
    second.close()


def test_what_a_change_raises_leaves_everything(catalog: SqliteCatalog) -> None:
    put(catalog, entry("a"))

    def change(before: NameRecord | None) -> NameRecord:
        raise AdapterExists("taken")

    for name in ("a", "b"):
        with pytest.raises(AdapterExists):
            catalog.update(name, change)
    assert catalog.get("a") == entry("a")
    assert catalog.get("b") is None


def test_digests_are_found_by_the_newest_version(catalog: SqliteCatalog) -> None:
    put(catalog, entry("a", 2), entry("b", 1, first=1))
    assert catalog.digests() == {digest(0), digest(1)}
    found = catalog.by_digest(digest(0))
    assert found is not None
    assert (found[0].name, found[1].number) == ("a", 1)
    assert catalog.by_digest(digest(5)) is None
    catalog.update("a", lambda e: (e or NameRecord("a")).remove(origin()))
    assert not catalog.is_referenced(digest(0))
    assert catalog.is_referenced(digest(1))


def test_usage_counts_shared_content_once_and_no_tombstones(catalog: SqliteCatalog) -> None:
    put(catalog, entry("a", 2), entry("b", 2), entry("c", 1, first=7))
    assert (catalog.usage().names, catalog.usage().stored_bytes) == (3, 3000)
    catalog.update("c", lambda e: (e or NameRecord("c")).remove(origin()))
    assert (catalog.usage().names, catalog.usage().stored_bytes) == (2, 2000)


def test_pinned(catalog: SqliteCatalog) -> None:
    put(catalog, entry("a").update_metadata(origin(), pinned=True), entry("b"))
    assert names(catalog.pinned()) == ["a"]
    catalog.update("a", lambda e: (e or NameRecord("a")).remove(origin()))
    assert catalog.pinned() == []


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    order=st.sampled_from(["name", "create_time", "update_time", "stored_bytes"]),
    descending=st.booleans(),
    limit=st.integers(1, 4),
)
def test_pages_together_are_the_whole_list(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    order: Order,
    descending: bool,
    limit: int,
) -> None:
    catalog = SqliteCatalog(tmp_path_factory.mktemp("c") / "c")
    for i, size in enumerate(sizes):  # equal sizes and times occur, so that names must part them
        made = NameRecord(f"n{i}").add(
            version(size, stored_bytes=size, digest=digest(i)), max_versions=9
        )
        put(catalog, made)
    query = Query(limit=limit, order=order, descending=descending)
    whole = catalog.query(replace(query, limit=100))
    keys = [(catalog.order_value(e, order), e.name) for e in whole]
    assert len(whole) == len(sizes)
    if order == "name":
        assert keys == sorted(keys, reverse=descending)
    else:
        values = [value for value, _ in keys]
        assert values == sorted(values, reverse=descending)  # type: ignore[type-var]
        assert all(a[1] < b[1] for a, b in pairwise(keys) if a[0] == b[0])
    paged: list[NameRecord] = []
    while page := catalog.query(query):
        paged += page
        query = replace(query, after=(catalog.order_value(page[-1], order), page[-1].name))
    assert paged == whole
    catalog.close()


def test_filters(catalog: SqliteCatalog) -> None:
    put(
        catalog,
        entry("ab1").update_metadata(origin(), labels={"team": "x", "tier": "1"}),
        entry("ab2").update_metadata(origin(), labels={"team": "x"}),
        entry("b_b").update_metadata(origin(), labels={"team": "y"}),
    )
    assert names(catalog.query(Query(9, prefix="ab"))) == ["ab1", "ab2"]
    assert names(catalog.query(Query(9, prefix="b_"))) == ["b_b"]
    assert names(catalog.query(Query(9, prefix="%"))) == []
    assert names(catalog.query(Query(9, labels={"team": "x"}))) == ["ab1", "ab2"]
    assert names(catalog.query(Query(9, labels={"team": "x", "tier": "1"}))) == ["ab1"]
    assert names(catalog.query(Query(9, family="ia3"))) == []
    assert len(catalog.query(Query(9, family="lora"))) == 3


def test_labels_that_go_are_found_no_more(catalog: SqliteCatalog) -> None:
    put(catalog, entry("a").update_metadata(origin(), labels={"k": "v"}))
    catalog.update("a", lambda e: (e or NameRecord("a")).update_metadata(origin(), labels={}))
    assert catalog.query(Query(9, labels={"k": "v"})) == []


def test_readers_do_not_wait_for_a_change(catalog: SqliteCatalog) -> None:
    put(catalog, entry("a"))
    entered, leave = threading.Event(), threading.Event()

    def change(before: NameRecord | None) -> NameRecord:
        entered.set()
        assert leave.wait(60)
        assert before is not None
        return before.add(version(5), max_versions=9)

    thread = threading.Thread(target=catalog.update, args=("a", change))
    thread.start()
    assert entered.wait(60)
    assert catalog.get("a") == entry("a")
    assert len(catalog.query(Query(9))) == 1
    leave.set()
    thread.join()
    found = catalog.get("a")
    assert found is not None
    assert found.latest.number == 2


def add_versions(path: str, first: int, count: int) -> None:
    catalog = SqliteCatalog(Path(path))
    for i in range(first, first + count):
        catalog.update("a", lambda e, i=i: (e or NameRecord("a")).add(version(i), max_versions=999))
    catalog.close()


def test_processes_change_one_name_in_turn(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=add_versions, args=(path, n * 20, 20)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    catalog = SqliteCatalog(Path(path))
    found = catalog.get("a")
    assert found is not None
    assert [v.number for v in found.versions] == list(range(1, 41))
    assert {v.digest for v in found.versions} == {digest(i) for i in range(40)}
    catalog.check_integrity()
    catalog.close()


def test_what_another_process_changes_is_seen_at_once(tmp_path: Path) -> None:
    one, other = SqliteCatalog(tmp_path / "c"), SqliteCatalog(tmp_path / "c")
    put(one, entry("a"))
    assert other.get("a") == entry("a")
    other.update("a", lambda e: (e or NameRecord("a")).add(version(5), max_versions=9))
    found = one.get("a")
    assert found is not None
    assert found.latest.number == 2
    one.close()
    other.close()


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "c") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(AdapterError, match="schema 99"):
        SqliteCatalog(tmp_path / "c")


def test_a_name_that_was_forgotten_and_made_anew_is_read_anew(catalog: SqliteCatalog) -> None:
    put(catalog, entry("a"))
    assert catalog.get("a") == entry("a")
    catalog.drop("a")
    assert catalog.get("a") is None
    catalog.put(entry("a", 2), "tag")
    assert catalog.get("a") == entry("a", 2)
    assert (catalog.tag("a"), catalog.tags()) == ("tag", {"a": "tag"})
