"""Shares between adapters, and bounds on how long others make one wait."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from adaplex.engine.fairness import MAX_IDLE, VirtualTokenCounter
from adaplex.engine.request import Request
from adaplex.engine.sequence import Sequence
from adaplex.engine.waiting_queue import WaitingQueue
from engine.fakes import Ledger, make_engine, make_request


def queue_of(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue()
    for number, request in enumerate(requests):
        queue.add(Sequence(request, number=number))
    return queue


def order(queue: WaitingQueue) -> list[str]:
    return [sequence.request_id for sequence in queue.in_order()]


def test_adapters_take_turns_and_each_line_goes_by_arrival() -> None:
    hot = [make_request(f"hot{i}", adapter="hot", arrival=i) for i in range(4)]
    cold = [make_request(f"cold{i}", adapter="cold", arrival=10 + i) for i in range(2)]
    base = [make_request("base", arrival=20)]
    found = order(queue_of(*hot, *cold, *base))
    assert found == ["hot0", "cold0", "base", "hot1", "cold1", "hot2", "hot3"]


def test_priority_comes_before_shares() -> None:
    requests = [make_request("low", adapter="a"), make_request("high", adapter="b", priority=1)]
    queue = queue_of(*requests)
    queue.charge(Sequence(requests[1]), output=1000)
    assert order(queue) == ["high", "low"]


def test_large_prompts_count_for_more() -> None:
    large = [make_request(f"l{i}", range(30), adapter="large", arrival=i) for i in range(3)]
    small = [make_request(f"s{i}", range(10), adapter="small", arrival=9 + i) for i in range(6)]
    found = order(queue_of(*large, *small))
    assert found == ["l0", "s0", "s1", "s2", "l1", "s3", "s4", "s5", "l2"]


def test_the_queue_may_lose_what_it_just_yielded() -> None:
    queue = queue_of(*(make_request(f"r{i}", adapter="ab"[i % 2], arrival=i) for i in range(6)))
    seen = []
    for sequence in queue.in_order():
        seen.append(sequence.request_id)
        if len(seen) % 2:
            queue.remove(sequence)
    assert sorted(seen) == [f"r{i}" for i in range(6)]
    assert len(queue) == 3
    assert len(list(queue)) == 3


def test_nobody_saves_up_service_while_away() -> None:
    counter = VirtualTokenCounter()
    counter.add_waiting("busy")
    counter.charge("busy", prompt=1000)
    counter.add_waiting("new")
    assert counter.counter("new") == counter.counter("busy")
    counter.remove_waiting("busy")
    counter.remove_waiting("new")
    counter.add_waiting("later")
    assert counter.counter("later") >= 1000


def test_what_runs_is_charged_while_nobody_of_its_key_waits() -> None:
    counter = VirtualTokenCounter()
    counter.add_waiting("a")
    counter.charge("a", prompt=100)
    counter.remove_waiting("a")
    counter.add_waiting("b")
    counter.charge("a", output=25)
    counter.add_waiting("a")
    assert counter.counter("b") == 100
    assert counter.counter("a") == 150


def test_keys_that_fell_behind_are_forgotten_even_if_somebody_always_waits() -> None:
    counter = VirtualTokenCounter()
    counter.add_waiting("busy")
    for number in range(5 * MAX_IDLE):
        counter.add_waiting(f"once{number}")
        counter.charge(f"once{number}", prompt=3)
        counter.remove_waiting(f"once{number}")
        counter.charge("busy", prompt=5)
    assert len(counter._counters) <= MAX_IDLE + 10
    counter.add_waiting("once7")
    assert counter.counter("once7") == counter.counter("busy") > 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=30, max_size=200))
def test_the_gap_between_two_that_always_wait_is_bounded(jobs: list[tuple[str, int]]) -> None:
    """The bound of the paper is twice the largest request, for any traffic."""
    counter = VirtualTokenCounter()
    lines = {key: [cost for k, cost in jobs if k == key] for key in "abc"}
    for key, line in lines.items():
        for _ in line:
            counter.add_waiting(key)
    served = Counter(dict.fromkeys("abc", 0))
    while all(lines.values()):
        key = min(lines, key=counter.counter)
        cost = lines[key].pop(0)
        counter.charge(key, prompt=cost)
        counter.remove_waiting(key)
        served[key] += cost
        gaps = [served[x] - served[y] for x in "abc" for y in "abc"]
        assert max(gaps) <= 2 * 50


def test_one_request_is_not_kept_waiting_by_a_hundred_of_another_adapter() -> None:
    engine, _ = make_engine(max_running=2, max_waiting=200, arena_bytes=1024)
    ledger = Ledger(engine)
    for i in range(100):
        engine.add(make_request(f"hot{i}", adapter="hot", arrival=i))
    for _ in range(6):
        ledger.step()
    engine.add(make_request("cold", adapter="cold", arrival=1000))
    before = len([r for r in ledger.outputs if r.startswith("hot") and ledger.last(r).last])
    while not ("cold" in ledger.outputs and ledger.last("cold").last):
        ledger.step()
    after = len([r for r in ledger.outputs if r.startswith("hot") and ledger.last(r).last])
    assert after - before <= 6, "a place or two, not the queue"
    ledger.drain()


def test_two_that_always_wait_get_equal_tokens_whatever_their_sizes() -> None:
    engine, _ = make_engine(max_running=3, max_waiting=400, arena_bytes=1024)
    ledger = Ledger(engine)
    for i in range(120):
        start = 100 * i  # no prompt begins like another, or the prefix cache would serve it
        engine.add(make_request(f"big{i}", range(start, start + 30), "big", max_tokens=12))
        engine.add(make_request(f"tiny{i}", range(start, start + 2), "tiny", max_tokens=2))
    served: Counter[str] = Counter()
    for _ in range(150):
        for output in ledger.step():
            kind = output.request_id.rstrip("0123456789")
            served[kind] += 2 * len(output.tokens)
            served[kind] += output.admitted * (30 if kind == "big" else 2)
    assert engine.stats().waiting > 50
    largest = 3 * (30 + 2 * 12)
    assert abs(served["big"] - served["tiny"]) <= 2 * largest
    ledger.drain()


def test_generated_tokens_are_charged_as_much_as_they_cost() -> None:
    engine, _ = make_engine(max_running=2, max_waiting=600, arena_bytes=1024)
    ledger = Ledger(engine)
    for i in range(250):
        prompt = range(100 * i, 100 * i + 4)
        engine.add(make_request(f"long{i}", prompt, "long", max_tokens=20))
        engine.add(make_request(f"short{i}", prompt, "short", max_tokens=1))
    served: Counter[str] = Counter()
    for _ in range(250):
        for output in ledger.step():
            kind = output.request_id.rstrip("0123456789")
            served[kind] += 2 * len(output.tokens) + 4 * output.admitted
    assert engine.stats().waiting_adapters == ("long", "short")
    largest = 4 + 2 * 20
    assert min(served.values()) > 4 * largest
    assert abs(served["long"] - served["short"]) <= 2 * 2 * largest


def test_nothing_idles_while_somebody_waits() -> None:
    engine, runner = make_engine(max_running=4, max_waiting=400)
    ledger = Ledger(engine)
    for i in range(40):
        engine.add(make_request(f"r{i}", adapter="only", max_tokens=3))
    ledger.drain()
    ran = [len(batch) for batch in runner.batches]
    assert ran == [4] * len(ran)
