"""Which outputs a reader gets at once, and when."""

from __future__ import annotations

from adaplex.engine.errors import ServerUnavailable
from adaplex.engine.output_stream import OutputStream
from adaplex.engine.request import FinishReason, StepOutput
from engine.fakes import make_request


async def test_outputs_that_wait_come_together_and_none_after_the_last() -> None:
    stream = OutputStream(make_request("r"))
    steps = [StepOutput("r", tokens=(n,)) for n in range(3)]
    last = StepOutput("r", tokens=(3,), finish=FinishReason.LENGTH)
    stream.put(steps[0])
    assert await stream.collect() == steps[:1]
    for output in (*steps[1:], last):
        stream.put(output)
    stream.fail(ServerUnavailable("the server has stopped"))
    assert stream.ended
    assert await stream.collect() == [*steps[1:], last]


async def test_after_the_first_token_so_many_come_at_a_time_and_the_rest_with_the_last() -> None:
    stream = OutputStream(make_request("r"), interval=4)
    admitted, *steps = (StepOutput("r", tokens=(n,) * (n > 0)) for n in range(8))
    for alone in (admitted, steps[0]):
        stream.put(alone)
        assert await stream.collect() == [alone]
    for output in steps[1:4]:
        stream.put(output)
        assert not stream._ready.is_set()
    stream.put(steps[4])
    assert await stream.collect() == steps[1:5]
    last = StepOutput("r", tokens=(9,), finish=FinishReason.LENGTH)
    for output in (steps[5], last):
        stream.put(output)
    assert await stream.collect() == [steps[5], last]


async def test_an_error_does_not_wait_for_an_interval() -> None:
    stream = OutputStream(make_request("r"), interval=100)
    first, second = (StepOutput("r", tokens=(n,)) for n in range(2))
    stream.put(first)
    assert await stream.collect() == [first]
    stream.put(second)
    stream.fail(ServerUnavailable("the server has stopped"))
    assert [bool(output.error) for output in await stream.collect()] == [False, True]
