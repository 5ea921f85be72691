from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaplex.server.stop_strings import StopStrings

SPECIAL = {1: "<|start|>", 2: "<s>", 3: "<s>x", 4: "<other>"}


pieces = st.lists(st.text("ab<|>", max_size=5), max_size=12)
stops = st.lists(st.text("ab<|>", min_size=1, max_size=4), min_size=1, max_size=3)


def cut_by_hand(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Returns the text before the first complete stop string, the longest one there, and it."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(pieces=pieces, stops=stops)
def test_a_stop_string_is_found_wherever_the_text_is_split(
    pieces: list[str], stops: list[str]
) -> None:
    matcher, out = StopStrings(stops), ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.found is not None:
            break
    out += matcher.flush()
    assert (out, matcher.found) == cut_by_hand("".join(pieces), stops)


@given(blind=pieces, pieces=pieces, stops=stops)
def test_a_stop_string_counts_from_the_first_text_that_is_looked_at(
    blind: list[str], pieces: list[str], stops: list[str]
) -> None:
    matcher = StopStrings(stops)
    out = "".join(matcher.push(piece, matching=False) for piece in blind)
    assert matcher.found is None
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.found is not None:
            break
    out += matcher.flush()
    text, seen = "".join(blind + pieces), len("".join(blind))
    ends = [end for end in range(seen + 1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    if not ends:
        assert (out, matcher.found) == (text, None)
        return
    found = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert (out, matcher.found) == (text[: ends[0] - len(found)], found)


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopStrings(["</s>"])
    assert matcher.push("a <") == "a "
    assert matcher.push("b") == "<b"
    assert matcher.flush() == ""


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_stop_string_is_found_wherever_it_is_cut_in_two(cut: int) -> None:
    matcher = StopStrings(["abcde"])
    assert matcher.push("x" + "abcde"[:cut]) == "x"
    assert matcher.push("abcde"[cut:] + "y") == ""
    assert matcher.found == "abcde"


def pushed(matcher: StopStrings, parts: Sequence[str | int]) -> str:
    """Returns the text that is left of text and special tokens."""
    out = ""
    for part in parts:
        if matcher.found is None:
            out += matcher.push(part if isinstance(part, str) else matcher.marks.get(part, ""))
    return out + matcher.flush()


@pytest.mark.parametrize(
    ("stop", "parts", "expected"),
    [
        ("<|start|>", ["ab", 1, "cd"], "ab"),
        ("<|start|>user", ["ab", 1, "us", "er"], "ab"),
        ("\n<|start|>", ["ab", "\n", 1, "cd"], "ab"),
        ("a<s><|start|>", ["b", "a", 2, 1], "b"),
        ("<s>x<s>", [3, "y", 3, 2], "y"),
    ],
)
def test_a_special_token_completes_the_stop_string_that_spells_it_out(
    stop: str, parts: list[str | int], expected: str
) -> None:
    matcher = StopStrings([stop], SPECIAL)
    assert pushed(matcher, parts) == expected
    assert matcher.found == stop


@pytest.mark.parametrize("stop", ["<|start|>", "<|start|>user", "x<s>"])
def test_the_same_spelling_as_text_is_found_too(stop: str) -> None:
    matcher = StopStrings([stop], SPECIAL)
    assert pushed(matcher, ["a", *stop, "b"]) == "a"
    assert matcher.found == stop


def test_special_tokens_that_complete_nothing_are_no_text() -> None:
    matcher = StopStrings(["<|start|>user", "<s>"], SPECIAL)
    assert set(matcher.marks) == {1, 2}
    assert pushed(matcher, ["a", 1, "b", 4, "c", 1, "use"]) == "abcuse"
    assert matcher.found is None


@pytest.mark.parametrize("stop", ["<", "start", "|>user"])
def test_a_stop_string_inside_a_special_token_is_not_completed_by_it(stop: str) -> None:
    matcher = StopStrings([stop], SPECIAL)
    assert matcher.marks == {}
    assert pushed(matcher, ["a", 1, "b"]) == "ab"
