from __future__ import annotations

import pytest

from adaplex.adapters.errors import AdapterInvalid, AdapterNotFound, StoreFull
from adaplex.adapters.storage.alias_split import Target, checked_split
from adaplex.adapters.storage.name_record import MAX_ALIASES, MAX_EVENTS, MAX_LABELS, NameRecord
from adapters.entries import digest, entry, origin, version


def resolved(of: NameRecord, alias: str = "", key: str = "") -> tuple[int, str]:
    found, followed = of.resolve(alias, key)
    return found.number, followed


def test_a_bare_name_follows_default_else_the_newest() -> None:
    a = entry(versions=3)
    assert resolved(a) == (3, "latest")
    pointed = a.set_alias("default", checked_split([Target(1)]), origin())
    assert resolved(pointed) == (1, "default")
    assert resolved(pointed, "latest") == (3, "latest")
    assert resolved(pointed.set_alias("default", (), origin())) == (3, "latest")
    assert resolved(a) == (3, "latest"), "entries never change"


def test_a_flip_is_seen_whole_and_its_event_says_both_sides() -> None:
    one, two = checked_split([Target(1)]), checked_split([Target(1, 95), Target(2, 5)])
    a = entry(versions=2).set_alias("prod", one, origin(1)).set_alias("prod", two, origin(2, "bo"))
    event = a.history[-1]
    assert (event.kind, event.alias, event.before, event.after) == ("alias", "prod", one, two)
    assert event.actor == "bo"
    assert {resolved(a, "prod", str(i))[0] for i in range(200)} == {1, 2}


def test_setting_what_is_set_changes_nothing() -> None:
    split = checked_split([Target(1)])
    a = entry().set_alias("prod", split, origin(1))
    assert a.set_alias("prod", split, origin(2)) is a
    assert a.update_metadata(origin(), description="") is a


def test_rollback_goes_back_one_change_and_twice_is_none() -> None:
    one, two = checked_split([Target(1)]), checked_split([Target(2)])
    a = entry(versions=2).set_alias("prod", one, origin()).set_alias("prod", two, origin())
    back = a.rollback("prod", origin())
    assert back.aliases["prod"] == one
    assert back.rollback("prod", origin()).aliases["prod"] == two


def test_rollback_of_a_first_setting_removes_the_alias() -> None:
    a = entry(versions=2).set_alias("default", checked_split([Target(1)]), origin())
    back = a.rollback("default", origin())
    assert "default" not in back.aliases
    assert resolved(back) == (2, "latest")


def test_rollback_of_a_default_that_was_never_set_leaves_the_newest() -> None:
    assert resolved(entry(versions=3).rollback("default", origin())) == (2, "default")
    with pytest.raises(AdapterInvalid, match="no earlier target"):
        entry(versions=1).rollback("default", origin())
    with pytest.raises(AdapterInvalid, match="no earlier target"):
        entry(versions=2).rollback("prod", origin())


def test_rollback_to_a_deleted_version_is_refused() -> None:
    a = entry(versions=2).set_alias("prod", checked_split([Target(1)]), origin())
    a = a.set_alias("prod", checked_split([Target(2)]), origin()).remove_version(1, origin())
    with pytest.raises(AdapterInvalid, match="version 1, which was deleted"):
        a.rollback("prod", origin())


def test_a_version_that_an_alias_points_to_stays() -> None:
    a = entry(versions=2).set_alias("prod", checked_split([Target(1), Target(2)]), origin())
    with pytest.raises(AdapterInvalid, match="a@prod points to version 1"):
        a.remove_version(1, origin())


def test_numbers_never_come_twice() -> None:
    a = entry(versions=2).remove_version(2, origin())
    assert a.latest.number == 1
    assert a.add(version(9), max_versions=9).latest.number == 3
    gone = a.remove(origin())
    assert not gone.alive
    assert gone.add(version(9), max_versions=9).latest.number == 3
    assert [event.kind for event in gone.history][-1] == "delete"


def test_removing_the_last_version_removes_the_name() -> None:
    a = entry().update_metadata(origin(), description="d", labels={"k": "v"}, pinned=True)
    gone = a.remove_version(1, origin())
    assert not gone.alive
    assert (gone.description, gone.labels, gone.pinned, gone.aliases) == ("", {}, False, {})
    with pytest.raises(AdapterNotFound):
        gone.remove(origin())
    with pytest.raises(AdapterNotFound):
        gone.resolve("")


def test_history_is_bounded() -> None:
    a = entry(versions=2)
    for i in range(MAX_EVENTS):
        a = a.set_alias("prod", checked_split([Target(1 + i % 2)]), origin(i))
    assert len(a.history) == MAX_EVENTS
    assert a.history[0].kind == "alias"


@pytest.mark.parametrize("alias", ["latest", "1", "", "a b", "x" * 65, "-a"])
def test_what_is_no_alias(alias: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        entry().set_alias(alias, checked_split([Target(1)]), origin())
    assert caught.value.field == "alias"


def test_bounds() -> None:
    with pytest.raises(StoreFull, match="has 2 versions, the limit is 2; delete some"):
        entry(versions=2).add(version(3), max_versions=2)
    a = entry()
    for i in range(MAX_ALIASES):
        a = a.set_alias(f"a{i}", checked_split([Target(1)]), origin())
    with pytest.raises(AdapterInvalid, match=f"{MAX_ALIASES} aliases already"):
        a.set_alias("more", checked_split([Target(1)]), origin())
    for labels in ({"": "v"}, {"k" * 64: "v"}, {"k": "v" * 257}):
        with pytest.raises(AdapterInvalid) as caught:
            a.update_metadata(origin(), labels=labels)
        assert caught.value.field == "set_labels"
    with pytest.raises(AdapterInvalid, match=f"at most {MAX_LABELS}"):
        a.update_metadata(origin(), labels={str(i): "" for i in range(MAX_LABELS + 1)})
    with pytest.raises(AdapterInvalid) as caught:
        a.update_metadata(origin(), description="x" * 1025)
    assert caught.value.field == "description"


def test_an_alias_to_a_version_that_is_not_there() -> None:
    with pytest.raises(AdapterNotFound, match=r"no version 7; it has 1$"):
        entry().set_alias("prod", checked_split([Target(7)]), origin())
    with pytest.raises(AdapterNotFound, match=r"no alias prod; it has latest$"):
        entry().set_alias("prod", (), origin())
    with pytest.raises(AdapterNotFound, match=r"no alias prod; it has latest$"):
        entry().resolve("prod")


def test_errors_list_the_newest_versions_only() -> None:
    with pytest.raises(AdapterNotFound, match=r"no version 99; it has 12, 11, .*, 3, \.\.\.$"):
        entry(versions=12).version(99)


def test_what_a_name_can_lead_to() -> None:
    a = entry(versions=3)
    assert [v.digest for v in a.reachable()] == [digest(2)]
    a = a.set_alias("default", checked_split([Target(1, 9), Target(2, 1)]), origin())
    assert [v.digest for v in a.reachable()] == [digest(0), digest(1)]


def test_a_rollback_goes_to_nowhere_that_an_alias_never_was() -> None:
    a = entry(versions=1).set_alias("default", checked_split([Target(1)]), origin())
    for i in range(MAX_EVENTS):
        a = a.update_metadata(origin(i), description=str(i))
    a = a.add(version(5), max_versions=9).add(version(6), max_versions=9)
    with pytest.raises(AdapterInvalid, match="no earlier target"):
        a.rollback("default", origin())


def test_a_rollback_knows_nothing_of_an_earlier_life() -> None:
    a = (
        entry(versions=2)
        .set_alias("default", checked_split([Target(1)]), origin())
        .remove(origin())
    )
    a = a.add(version(5), max_versions=9).add(version(6), max_versions=9)
    assert resolved(a.rollback("default", origin())) == (3, "default")
