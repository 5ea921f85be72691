from __future__ import annotations

from engine.fakes import (
    UNIT,
    InlineExecutor,
    Ledger,
    ManualExecutor,
    make_adapter,
    make_engine,
    make_request,
    run_all,
)
from fake_runner import FakeRunner, Row, expected


def shape(batch: list[Row]) -> list[tuple[str, int, int]]:
    return [(row.request_id, row.start, row.length) for row in batch]


def test_long_prompts_are_chunked_and_decodes_go_first() -> None:
    engine, runner = make_engine()
    run_all(
        engine,
        [
            make_request("short", [1, 2], max_tokens=4),
            make_request("long", range(20), max_tokens=2),
        ],
    )
    assert [shape(batch) for batch in runner.batches] == [
        [("short", 0, 2), ("long", 0, 8)],
        [("short", 2, 1), ("long", 8, 8)],
        [("short", 3, 1), ("long", 16, 4)],
        [("short", 4, 1), ("long", 20, 1)],
    ]


def test_prompts_fill_a_step_to_its_limits() -> None:
    engine, runner = make_engine(max_step_tokens=20, max_running=8, prefix_cache=False)
    requests = [make_request(f"r{n}", range(n, n + 9 + n * 3), max_tokens=6) for n in range(8)]
    run_all(engine, requests)
    for batch in runner.batches:
        assert sum(row.length for row in batch) <= 20
        assert all(row.length <= 8 for row in batch)
    assert sum(row.length for row in runner.batches[0]) == 20


def test_some_prompt_goes_on_even_when_no_whole_chunk_has_room() -> None:
    engine, _ = make_engine(max_step_tokens=8, max_running=8)
    ledger = Ledger(engine)
    requests = [make_request(f"d{n}", [n], max_tokens=40) for n in range(4)]
    for request in requests:
        engine.add(request)
    ledger.step()
    long = make_request("long", range(30), max_tokens=1)
    engine.add(long)
    for _ in range(8):
        ledger.step()
    assert ledger.tokens("long") == expected(long)


def test_rows_of_one_adapter_are_neighbours_in_decode_and_in_prefill() -> None:
    engine, runner = make_engine()
    names = ["b", None, "a", "b", "a", None]
    run_all(engine, [make_request(f"warm{name}", [9], name) for name in ("a", "b")])
    runner.batches.clear()
    run_all(engine, [make_request(f"r{n}", [n, 5], name) for n, name in enumerate(names)])
    for batch in (runner.batches[0], runner.batches[-1]):
        assert [row.adapter for row in batch] == ["", "", "a", "a", "b", "b"]


def test_priority_then_arrival_decides_who_starts() -> None:
    engine, runner = make_engine(max_running=1)
    for name, priority, arrival in [("late", 0, 2.0), ("early", 0, 1.0), ("urgent", 5, 3.0)]:
        engine.add(make_request(name, [1], max_tokens=1, priority=priority, arrival=arrival))
    Ledger(engine).drain()
    assert [shape(batch)[0][0] for batch in runner.batches] == ["urgent", "early", "late"]


def test_preemption_changes_no_answer_and_emits_nothing_twice() -> None:
    engine, runner = make_engine(num_blocks=17, prefix_cache=False)
    ledger = run_all(
        engine, [make_request(f"r{n}", range(n, n + 5), max_tokens=30) for n in range(8)]
    )
    recomputed = [row for batch in runner.batches for row in batch if row.start == 0]
    assert len(recomputed) > 8, "the cache is too large to make anyone give way"
    for outputs in ledger.outputs.values():
        assert [output.admitted for output in outputs].count(True) == 1
        assert outputs[0].admitted


def test_the_least_urgent_gives_way_and_the_most_urgent_never_does() -> None:
    engine, runner = make_engine(num_blocks=17, prefix_cache=False)
    requests = [
        make_request(f"r{n}", range(n, n + 5), max_tokens=40, priority=n == 3) for n in range(4)
    ]
    run_all(engine, requests)
    starts = [row.request_id for batch in runner.batches for row in batch if row.start == 0]
    assert starts.count("r3") == 1
    assert starts.count("r2") > 1


def test_what_was_preempted_finds_its_prefix_again() -> None:
    engine, runner = make_engine(num_blocks=17, max_model_len=64)
    run_all(engine, [make_request(f"r{n}", range(n, n + 9), max_tokens=20) for n in range(4)])
    resumed = [row for batch in runner.batches for row in batch if row.length > 1 and row.start > 8]
    assert resumed


def test_admission_leaves_a_block_for_each_that_runs() -> None:
    engine, runner = make_engine(num_blocks=17, max_step_tokens=64, max_chunk_tokens=48)
    ledger = Ledger(engine)
    first = make_request("first", range(37), max_tokens=10)
    fits, too_long = (make_request(f"p{n}", range(50, 50 + n), max_tokens=2) for n in (20, 21))
    engine.add(first)
    engine.add(too_long)
    ledger.step()
    assert engine.stats().running == 1
    engine.abort("p21")
    engine.add(fits)
    ledger.step()
    assert engine.stats().running == 2
    ledger.drain()
    for request in (first, fits):
        assert ledger.tokens(request.request_id) == expected(request)
    assert sum(row.start == 0 for batch in runner.batches for row in batch) == 2


def test_a_long_prompt_is_not_passed_over_for_short_ones() -> None:
    engine, runner = make_engine(num_blocks=17)
    ledger = Ledger(engine)
    engine.add(make_request("running", range(30), max_tokens=8))
    engine.add(make_request("long", range(100, 140), max_tokens=2))
    for number in range(20):
        engine.add(make_request(f"short{number}", [number], max_tokens=2))
    ledger.drain()
    order = [row.request_id for batch in runner.batches for row in batch]
    assert order.index("long") < order.index("short0")


def test_an_adapter_that_loads_holds_nobody_else_up() -> None:
    executor = ManualExecutor()
    engine, _ = make_engine(executor)
    ledger = Ledger(engine)
    slow, base = make_request("slow", adapter="a"), make_request("base")
    engine.add(slow)
    engine.add(base)
    for _ in range(5):
        ledger.step()
    assert ledger.tokens("base") == expected(base)
    assert "slow" not in ledger.outputs
    assert engine.stalled
    executor.run_all()
    ledger.drain()
    assert ledger.tokens("slow") == expected(slow)


def test_adapters_of_the_next_few_are_loaded_while_no_place_is_free() -> None:
    executor = ManualExecutor()
    engine, runner = make_engine(executor, max_running=3, arena_bytes=9 * UNIT)
    for number in range(4):
        engine.add(make_request(f"base{number}", max_tokens=20))
    engine.step()
    for name in "abcd":
        engine.add(make_request(name, adapter=name))
    engine.step()
    executor.run_all()
    assert runner.loads == ["sha256:a", "sha256:b"]


def test_what_was_loaded_ahead_for_one_is_not_evicted_for_a_later_one() -> None:
    engine, runner = make_engine(arena_bytes=UNIT, max_running=2)
    requests = [make_request(f"base{n}", max_tokens=12) for n in range(2)]
    run_all(engine, requests + [make_request(name, adapter=name) for name in "ab"])
    assert runner.loads == ["sha256:a", "sha256:b"]


def test_one_hot_adapter_does_not_starve_another() -> None:
    engine, _ = make_engine(arena_bytes=UNIT, max_running=4, max_bypass=4, max_waiting=1000)
    ledger = Ledger(engine)
    number = 0

    def add_hot(count: int) -> None:
        nonlocal number
        for _ in range(count):
            engine.add(make_request(f"hot{number}", [number], "hot", max_tokens=3 + number % 4))
            number += 1

    add_hot(6)
    ledger.step()
    ledger.step()
    other = make_request("other", adapter="other", max_tokens=1)
    engine.add(other)
    for _ in range(30):
        add_hot(2)
        ledger.step()
    assert engine.stats().waiting > 10, "the hot queue is not deep"
    assert ledger.tokens("other") == expected(other)
    ledger.drain()


def test_a_later_load_does_not_take_the_room_of_an_earlier_one() -> None:
    engine, runner = make_engine(arena_bytes=2 * UNIT)
    ledger = Ledger(engine)
    for name in ("a", "b"):
        engine.add(make_request(name, adapter=name, max_tokens=3 if name == "a" else 12))
    ledger.step()
    ledger.step()
    engine.add(make_request("large", adapter=make_adapter("large", 2 * UNIT), max_tokens=2))
    engine.add(make_request("small", adapter="small", max_tokens=2))
    ledger.drain()
    assert runner.loads == ["sha256:a", "sha256:b", "sha256:large", "sha256:small"]


def test_twenty_adapters_pass_through_an_arena_for_three() -> None:
    engine, runner = make_engine(arena_bytes=3 * UNIT, max_running=8)
    requests = [
        make_request(f"r{n}", [n, n + 1], f"adapter{n * 7 % 20}", max_tokens=1 + n % 7)
        for n in range(100)
    ]
    run_all(engine, requests)
    assert len(set(runner.loads)) == 20
    assert len(engine.stats().resident) <= 3


def test_loads_in_any_order_of_completion_end_well() -> None:
    executor = ManualExecutor()
    engine, _ = make_engine(executor, max_running=4)
    ledger = Ledger(engine)
    requests = [
        make_request(f"r{n}", [n], make_adapter(f"x{n % 9}", UNIT * (1 + n % 3)), max_tokens=3)
        for n in range(40)
    ]
    for request in requests:
        engine.add(request)
    for _ in range(1000):
        if not engine.has_work:
            break
        ledger.step()
        if executor.jobs:
            executor.run(-1)
    for request in requests:
        assert ledger.tokens(request.request_id) == expected(request)
    ledger.check_idle()


def test_a_preempted_sequence_keeps_no_lease_and_comes_back() -> None:
    runner = FakeRunner()
    engine, _ = make_engine(InlineExecutor(), runner, num_blocks=17, arena_bytes=2 * UNIT)
    names = ["a", "b", "c", None, "a", "b", "c", None]
    requests = [
        make_request(f"r{n}", range(n, n + 6), name, max_tokens=25) for n, name in enumerate(names)
    ]
    run_all(engine, requests)
    assert len(runner.loads) >= 3
