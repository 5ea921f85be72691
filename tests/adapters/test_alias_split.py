from __future__ import annotations

from collections import Counter

import pytest

from adaplex.adapters.errors import AdapterInvalid
from adaplex.adapters.storage.alias_split import (
    MAX_TARGETS,
    Split,
    Target,
    checked_split,
    choose_version,
)

KEYS = [f"user-{i}" for i in range(20_000)]


def version_by_key(split: Split) -> dict[str, int]:
    return {key: choose_version(split, key, "a@default") for key in KEYS}


def test_shares_follow_the_weights() -> None:
    split = checked_split([Target(4, 5), Target(3, 95)])
    counts = Counter(version_by_key(split).values())
    assert counts[4] / len(KEYS) == pytest.approx(0.05, abs=0.01)
    drawn = Counter(choose_version(split, "", "a@default") for _ in range(20_000))
    assert drawn[4] / 20_000 == pytest.approx(0.05, abs=0.01)


def test_each_of_three_versions_gets_its_share() -> None:
    split = checked_split([Target(1, 50), Target(2, 30), Target(3, 20)])
    counts = Counter(version_by_key(split).values())
    shares = {version: count / len(KEYS) for version, count in counts.items()}
    assert shares == pytest.approx({1: 0.5, 2: 0.3, 3: 0.2}, abs=0.01)


def test_a_key_keeps_its_version_while_the_canary_grows() -> None:
    before, after = (
        version_by_key(checked_split([Target(3, 100 - w), Target(4, w)])) for w in (5, 20)
    )
    assert all(after[key] == 4 for key, version in before.items() if version == 4)
    moved = sum(before[key] != after[key] for key in KEYS)
    assert moved / len(KEYS) == pytest.approx(0.15, abs=0.01)


def test_aliases_draw_apart() -> None:
    split = checked_split([Target(1), Target(2)])
    one = [choose_version(split, key, "a@default") for key in KEYS]
    other = [choose_version(split, key, "b@default") for key in KEYS]
    same = sum(x == y for x, y in zip(one, other, strict=True))
    assert same / len(KEYS) == pytest.approx(0.5, abs=0.02)


def test_a_single_target_gets_everything() -> None:
    assert set(version_by_key(checked_split([Target(7, 0.001)])).values()) == {7}


@pytest.mark.parametrize(
    "targets",
    [
        [],
        [Target(i + 1) for i in range(MAX_TARGETS + 1)],
        [Target(1), Target(1)],
        [Target(1, 0.0)],
        [Target(1, -1.0)],
        [Target(1, float("nan"))],
        [Target(1, float("inf"))],
    ],
)
def test_what_is_no_split(targets: list[Target]) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        checked_split(targets)
    assert caught.value.field == "targets"
