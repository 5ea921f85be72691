from __future__ import annotations

import pytest

from adaplex.server.slots import Slots


class Full(Exception):
    pass


def test_a_slot_is_free_again_after_use() -> None:
    slots = Slots(1, Full)
    for _ in range(2):
        with slots.slot(), pytest.raises(Full), slots.slot():
            pass
    assert slots.occupied == 0


def test_a_slot_is_free_again_after_an_error() -> None:
    slots = Slots(1, Full)
    with pytest.raises(KeyError), slots.slot():
        raise KeyError
    assert slots.occupied == 0
