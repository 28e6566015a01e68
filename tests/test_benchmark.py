"""The benchmark's driver: report, ratios, choice of modes and the worker protocol, with a fake worker and no framework."""

from __future__ import annotations

import dataclasses
import math
import sys
import time

import pytest

from benchmarks import cases as cases_lib
from benchmarks import report
from benchmarks.cases import ALONE, OURS, PEER, PRODUCT, Bar, Case, Contender
from benchmarks.protocol import Worker, WorkerDied, WorkerError, one_line
from benchmarks.runner import Result, Trial, Workers, measure

# A worker without a framework. It prints to stdout on purpose: that must not reach the protocol.
FAKE = """
import os, time
from benchmarks.protocol import Prepared, serve

print("noise of a library")

def sleep(ms):
    if ms < 0:
        raise ValueError("ms is negative\\nsecond line")
    return Prepared(lambda seed: seed, lambda seed: time.sleep(ms / 1e3))

def echo():
    seeds = []
    return Prepared(lambda seed: seeds.append(seed) or print(seeds), lambda seed: None)

def die():
    os._exit(3)

def fragile():
    made = sleep(1)
    return Prepared(lambda seed: os._exit(4) if seed < 1000 else seed, made.run)

def grab(mb):
    return Prepared(lambda seed: seed, lambda seed: bytearray(b"x") * (mb << 20) and None)

builders = {"sleep": sleep, "die": die, "fragile": fragile, "echo": echo, "grab": grab}
serve(builders, {"add": lambda a, b: a + b}, {"fake": "1.0"})
"""


def start(side: str = "fake") -> Worker:
    return Worker([sys.executable, "-c", FAKE], timeout=60)


@pytest.fixture
def worker():
    made = start()
    yield made
    made.close()


def sleeper(ms: float, label: str = "") -> Contender:
    return Contender("fake", "sleep", {"ms": ms}, label or f"sleeps {ms}")


def make_case(ours: list[Contender], peers: list[Contender], **fields) -> Case:
    bars = [Bar("a row", "ratio", PEER, 1.5, 2.0)]
    return Case("fake", "fakes", {OURS: ours, PEER: peers}, bars, **fields)


def run_case(case: Case, repeats: int = 2) -> Result:
    workers = Workers(start)
    try:
        return measure(case, workers, repeats=repeats)
    finally:
        workers.close()


def test_worker_runs_times_and_forgets(worker):
    assert worker.versions == {"fake": "1.0"} and worker.baseline > 1
    assert worker.build("a", "sleep", {"ms": 20}, warmup=2, timeout=60) > 0.04
    times = worker.run("a", 0, burst=3, skip=1)
    assert len(times) == 2 and all(20 <= t < 500 for t in times)
    assert worker.call("add", a=2, b=3) == 5
    worker.drop()
    with pytest.raises(WorkerError, match="KeyError"):
        worker.run("a", 0)


def test_worker_survives_an_error_and_reports_its_first_line(worker):
    with pytest.raises(WorkerError, match="^ValueError: ms is negative$"):
        worker.build("a", "sleep", {"ms": -1}, warmup=0, timeout=60)
    assert worker.call("add", a=1, b=1) == 2


def test_worker_that_dies_or_hangs_is_named(worker):
    with pytest.raises(WorkerDied, match="status 3"):
        worker.build("a", "die", {}, warmup=0, timeout=60)
    slow = start()
    try:
        slow.build("a", "sleep", {"ms": 60_000}, warmup=0, timeout=60)
        begin = time.monotonic()
        with pytest.raises(WorkerDied, match="longer than 1 s"):
            slow.run("a", 0, timeout=1)
        assert time.monotonic() - begin < 10
    finally:
        slow.close()


def test_measure_takes_turns_and_the_ratio_is_of_medians():
    result = run_case(make_case([sleeper(10)], [sleeper(30)], burst=2, skip=1), repeats=3)
    assert [len(result.values[role]) for role in (OURS, PEER)] == [3, 3]
    (row,) = report.result_rows([result])
    # Sleeping is at least as long as asked, and a busy machine adds milliseconds to either side.
    assert 1.2 < row.value < 3.5
    exact = dataclasses.replace(result, values={OURS: [10.0, 20.0, 90.0], PEER: [1.0, 35.0, 36.0]})
    assert report.result_rows([exact])[0].value == 35.0 / 20.0


def test_products_alone_are_a_table_of_their_own():
    case = make_case([sleeper(1)], [sleeper(1)])
    result = Result(case, {OURS: [20.0], PEER: [30.0], ALONE: [10.0, 12.0, 17.0]})
    assert report.alone_cells([result])[1:] == [("a row", "12.0 (10.0–17.0) ms", "2.50×", "1.50×")]
    assert report.alone_cells([Result(case, {OURS: [20.0], PEER: [30.0]})])[1:] == []
    page = report.page([result], command="run", versions={}, checks=[])
    assert "| a row | 12.0 (10.0–17.0) ms | 2.50× | 1.50× |" in page
    assert report.mode_lines([Result(case, trials={ALONE: [Trial("the products", value=1.0)]})]) == []


def test_measure_keeps_the_fastest_mode_and_tells_of_the_others():
    modes = [sleeper(-1, "cannot"), sleeper(40, "slow"), sleeper(2, "fast")]
    result = run_case(make_case([sleeper(1)], modes))
    assert result.chosen[PEER] == "fast" and max(result.values[PEER]) < 40
    (line,) = report.mode_lines([result])
    assert line.startswith("fake, peer: fast. Also tried: cannot: failed (ValueError: ms is negative); slow: 4")


def test_measure_goes_on_after_a_worker_died():
    modes = [sleeper(2, "works"), Contender("fake", "die", {}, "dies")]
    result = run_case(make_case([sleeper(1)], modes))
    # The dead process had dsv3's contender too: here both sides are one fake.
    assert result.chosen[PEER] == "works" and len(result.values[PEER]) == 2
    assert "status 3" in result.trials[PEER][1].error


def test_measure_reports_a_side_that_fails_in_its_turn():
    result = run_case(make_case([sleeper(1)], [Contender("fake", "fragile", {}, "breaks")]))
    (row,) = report.result_rows([result])
    assert row.mark == "failed" and row.peer == "failed" and PEER not in result.values
    assert "status 4" in result.trials[PEER][-1].error


def test_memory_is_the_peak_of_a_fresh_process():
    grab = [Contender("fake", "grab", {"mb": mb}, f"{mb}") for mb in (400, 200)]
    bars = [Bar("memory", "memory", PEER, 1.0, 2.0)]
    case = Case("memory", "memory", {OURS: grab[1:], PEER: grab}, bars, memory=True)
    result = run_case(case)
    assert result.chosen[PEER] == "200"
    # 200 MiB are 210 MB; the interpreter itself adds a little.
    assert 205 < result.values[OURS][0] < 230
    assert 405 < result.trials[PEER][0].value < 450


def fixed_result(ours, peer, kind="ratio", **fields) -> Result:
    bar = Bar("a row", kind, PRODUCT, 60, 75) if kind == "rate" else Bar("a row", kind, PEER, 1.5, 2.0)
    case = Case("fixed", "fixed", {}, [bar], flops={OURS: 3e9, PRODUCT: 10e9}, memory=kind == "memory", **fields)
    values = {OURS: ours, bar.role: peer}
    return Result(case, {role: v for role, v in values.items() if v})


@pytest.mark.parametrize("peer, mark", [([14.9], "below"), ([15.0], "pass"), ([20.0], "aim"), ([], "failed")])
def test_marks(peer, mark):
    assert report.result_rows([fixed_result([10.0], peer)])[0].mark == mark


def test_rate_is_in_percent_of_the_product():
    # 3 GFLOP in 20 ms are 150 GFLOP/s; 10 GFLOP in 40 ms are 250.
    (row,) = report.result_rows([fixed_result([20.0], [40.0], kind="rate")])
    assert math.isclose(row.value, 60.0) and row.mark == "pass" and row.peer == "250 GFLOP/s"
    assert row.cells()[3:6] == ("60%", "60%", "75%")


def test_a_memory_limit_stands_in_for_a_peer():
    (row,) = report.result_rows([fixed_result([1000.0], [], kind="memory", limit=(2147.0, "scores"))])
    assert row.cells() == ("a row", "1,000 MB in 0 s", "2,147 MB: scores", "2.15×", "1.50×", "2.00×", "aim")


def test_text_table_is_aligned():
    rows = report.result_rows([fixed_result([10.0, 12.0, 900.0], [1234.0]), fixed_result([1.0], [])])
    head, rule, first, second = report.text_table(rows).splitlines()
    end = first.index("ms") + 2
    assert first[:end].endswith("12.0 (10.0–900) ms") and second[:end].endswith("1.00 (1.00–1.00) ms")
    assert head[:end].endswith("dsv3") and set(rule) == {"-", " "}
    assert [line.split()[-1] for line in (first, second)] == ["aim", "failed"]


def test_page_has_table_modes_notes_and_no_machine_names():
    result = fixed_result([10.0], [20.0])
    result.case = dataclasses.replace(result.case, note="What is what.")
    result.trials[PEER] = [Trial("compiled", value=20.0), Trial("plain", error=one_line("no /usr/lib/x/y.so\nmore"))]
    result.chosen[PEER] = "compiled"
    text = report.page([result, result], command="python x.py", versions={"a": "1"}, checks=["Checked."])
    assert "| a row | 10.0 (10.0–10.0) ms | 20.0 (20.0–20.0) ms | 2.00× | 1.50× | 2.00× | aim |" in text
    assert "fixed, peer: compiled. Also tried: plain: failed (no ...)" in text
    assert text.count("- What is what.") == 1 and "- Checked." in text and "python x.py" in text
    assert "/usr" not in text


def test_cases_are_selected_by_name_and_group():
    every = cases_lib.all_cases()
    assert len({case.name for case in every}) == len(every)
    chosen = cases_lib.select_cases(every, ["prefill_32k", "train"])
    assert [case.name for case in chosen] == ["train_bf16", "train_f32", "prefill_32k"]
    with pytest.raises(ValueError, match="'trian', want some of .*train_bf16"):
        cases_lib.select_cases(every, ["trian"])


@pytest.mark.parametrize("quick", [False, True])
def test_every_case_has_a_preferred_mode_that_needs_no_compiler(quick):
    for case in map(cases_lib.without_compile, cases_lib.all_cases(quick=quick, all_modes=True)):
        assert all(case.roles.values()), case.name
        assert {bar.role for bar in case.bars} <= set(case.roles) or case.limit, case.name
        for candidates in case.roles.values():
            assert len({c.label for c in candidates}) == len(candidates), case.name
