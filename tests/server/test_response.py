from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from adaplex.engine.request import (
    FinishReason,
    Logprob,
    Request,
    SamplingParams,
    StepOutput,
    Timing,
)
from adaplex.server.response import Response
from adaplex.v1.generation_pb2 import GenerationFinished
from server.fake_model import EOS, ByteTokenizer

TIMINGS = ("first_token_seconds", "total_seconds")


@dataclass(frozen=True)
class Case:
    """A request and the engine's outputs for it, one token per step."""

    tokens: tuple[int, ...]
    stops: tuple[str, ...] = ()
    min_tokens: int = 0
    logprobs: bool = False

    @property
    def request(self) -> Request:
        sampling = SamplingParams(max_tokens=len(self.tokens), min_tokens=self.min_tokens)
        return Request("r", tuple(b"prompt"), sampling)

    @property
    def outputs(self) -> list[StepOutput]:
        """The admission, then one output per token, the last with the end."""
        admitted = StepOutput("r", admitted=True, timing=Timing(queued=0.5))
        steps = [self._step(token) for token in self.tokens[:-1]]
        finish = FinishReason.STOP if self.tokens[-1] == EOS else FinishReason.LENGTH
        return [admitted, *steps, self._step(self.tokens[-1], finish)]

    def _step(self, token: int, finish: FinishReason | None = None) -> StepOutput:
        logprobs = (Logprob(token, -0.5, ((token, -0.5),)),) if self.logprobs else ()
        timing = Timing(queued=0.5, cached_tokens=3) if finish else None
        return StepOutput("r", tokens=(token,), logprobs=logprobs, finish=finish, timing=timing)


@dataclass
class Observed:
    """The observable parts of a response, for client and metrics."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[int] = field(default_factory=list)
    gaps: int = 0
    finished: GenerationFinished = field(default_factory=GenerationFinished)


def observed(case: Case, groups: Sequence[Sequence[StepOutput]]) -> Observed:
    response, found = Response(ByteTokenizer(), case.request, case.stops), Observed()
    for group in groups:
        delta = response.add(group)
        found.gaps += len(response.gaps)
        if delta is not None:
            found.text += delta.text
            found.tokens += delta.token_ids
            found.logprobs += [entry.token_id for entry in delta.logprobs]
        if response.ended:
            break
    found.finished = response.finished()
    for name in TIMINGS:
        found.finished.ClearField(name)  # type: ignore[arg-type]
    return found


CASES = st.builds(
    Case,
    # Letters of which stops are made, half characters, and an end.
    tokens=st.builds(
        lambda body, end: (*body, *end),
        st.lists(st.sampled_from([*b"abc", *"ü".encode()]), max_size=12),
        st.sampled_from([(EOS,), (ord("a"),), ("ü".encode()[0],)]),
    ),
    stops=st.lists(st.text("abcü", min_size=1, max_size=3), max_size=2).map(tuple),
    min_tokens=st.integers(0, 6),
    logprobs=st.booleans(),
)


@given(CASES, st.data())
def test_however_steps_are_grouped_the_answer_is_the_same(case: Case, data: st.DataObject) -> None:
    outputs = case.outputs
    alone = observed(case, [[output] for output in outputs])
    cuts = data.draw(st.sets(st.integers(1, len(outputs) - 1)), label="cuts")
    groups = [outputs[a:b] for a, b in pairwise([0, *sorted(cuts), len(outputs)])]
    assert observed(case, groups) == alone
    assert alone.logprobs == (alone.tokens if case.logprobs else [])
    assert alone.finished.completion_tokens == len(alone.tokens) == alone.gaps + 1


def test_steps_after_a_stop_string_add_nothing() -> None:
    case = Case(tuple(b"hello world"), stops=("lo",), logprobs=True)
    found = observed(case, [case.outputs])
    assert found.text == "hel"
    assert bytes(found.tokens) == bytes(found.logprobs) == b"hello"
    assert found.finished.stop == "lo"
    assert found.finished.completion_tokens == 5


def test_a_stop_string_within_min_tokens_is_text_in_a_group_too() -> None:
    case = Case(tuple(b"ababab"), stops=("ab",), min_tokens=2)
    found = observed(case, [case.outputs])
    assert found.text == "ab"
    assert found.finished.completion_tokens == 4


SPECIAL = {EOS: "<eos>"}


def ended_by(case: Case) -> tuple[str, GenerationFinished]:
    response = Response(ByteTokenizer(), case.request, case.stops, special=SPECIAL)
    delta = response.add(case.outputs)
    assert delta is not None
    return delta.text, response.finished()


def test_a_special_token_that_a_stop_string_spells_out_ends_the_answer_before_it() -> None:
    for stop in ("<eos>", "<eos>b"):
        text, finished = ended_by(Case((*b"aa", EOS, *b"bc"), stops=(stop,)))
        assert (text, finished.stop) == ("aa", stop)
        assert finished.completion_tokens == 2 + len(stop.removeprefix("<eos>")) + 1
    text, finished = ended_by(Case((*b"aa", EOS, *b"bc"), stops=("b<eos>",)))
    assert (text, finished.stop) == ("aabc", "")


def test_the_end_of_sequence_completes_a_stop_string_that_ends_in_it() -> None:
    text, finished = ended_by(Case((*b"abc", EOS), stops=("c<eos>",)))
    assert (text, finished.stop, finished.completion_tokens) == ("ab", "c<eos>", 4)
    text, finished = ended_by(Case((*b"abc", EOS), stops=("b<eos>",)))
    assert (text, finished.stop) == ("abc", str(EOS))


def test_a_special_token_within_min_tokens_ends_nothing() -> None:
    text, finished = ended_by(Case((*b"a", EOS, *b"bc"), stops=("<eos>",), min_tokens=2))
    assert (text, finished.stop) == ("abc", "")


def test_the_first_message_has_the_warnings_of_the_prompt() -> None:
    case = Case(tuple(b"a"))
    response = Response(ByteTokenizer(), case.request, (), warnings=["two BOS"])
    assert list(response.started(case.outputs[0], "r", "toy").warnings) == ["two BOS"]


def test_the_gaps_are_those_between_the_steps_however_they_come() -> None:
    case = Case(tuple(b"abcd"))
    response = Response(ByteTokenizer(), case.request, ())
    outputs = [replace(output, at=1 + 0.25 * n) for n, output in enumerate(case.outputs)]
    response.add(outputs[:2])
    assert response.gaps == []
    response.add(outputs[2:])
    assert response.gaps == [0.25] * 3
    response.add([])
    assert response.gaps == []
