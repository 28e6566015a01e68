"""The data half of the plan: its arithmetic by hand, reports that are read, the program and its document, bad input."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.data import save_tokenizer, train_tokenizer
from dsv3.plan import (
    DataPlan,
    StageRate,
    change_kept,
    data_reading,
    data_saving,
    data_storage,
    data_work,
    params_by_part,
    prepare_hosts,
    read_rates,
)
from dsv3.plan.data import ORIGINS
from tests.plan.models import V3, specs

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "data_plan.md").read_text(encoding="utf-8")
REPORT = ROOT / "docs" / "data_report.json"


def test_the_published_run_by_hand():
    plan = DataPlan()
    assert (plan.hosts, plan.token_bytes) == (256, 4)
    found = data_storage(plan)
    assert found.tokens == 14.8e12 * 4 and found.index == 14.8e9 * 24 and found.text == 14.8e12 * 4
    assert found.raw == 14.8e12 * 4 / 0.5 * 0.35 and found.signatures == 14.8e9 / 0.5 * 128 * 4
    assert found.shards == 55_135 == -(-59_200 * 10**9 // 2**30) and found.windows == -(-14_800 * 10**9 // 2**20)
    reading = data_reading(plan)
    seconds = 2.664e6 / 2048 * 3600  # 54.2 days
    assert reading.tokens_per_second == pytest.approx(14.8e12 / seconds) == pytest.approx(3_160_494, rel=1e-6)
    assert reading.bytes_per_second == pytest.approx(14.8e12 / seconds / 4096 * 4097 * 4)
    assert reading.host_bytes == reading.bytes_per_second / 256
    params = sum(sum(params_by_part(V3, specs(V3), mtp=mtp).values()) for mtp in (False, True))
    saving = data_saving(plan, params)
    assert saving.bytes == 8 * (671_026_404_352 + 11_610_067_968)
    assert saving.seconds == pytest.approx(saving.bytes / 256 / 1e9)
    assert saving.bandwidth == pytest.approx(saving.bytes / 1800) and saving.blocked == pytest.approx(saving.seconds / 1800)
    assert saving.lost == pytest.approx(0.25 / plan.failure_hours)
    assert data_saving(plan, params, moment_bytes=4).bytes == 1.5 * saving.bytes


def test_young_is_the_best_interval():
    def wasted(minutes):
        found = data_saving(DataPlan(save_minutes=minutes), 10**12)
        return found.blocked + found.lost

    best = data_saving(DataPlan(), 10**12).best_minutes
    assert wasted(best) < min(wasted(0.9 * best), wasted(1.1 * best))


@settings(max_examples=50)
@given(st.floats(1e6, 1e14), st.floats(0.5, 8), st.floats(0.01, 1), st.integers(1, 9), st.integers(2, 2**18))
def test_what_grows_with_what(tokens, size, kept, times, vocab):
    plan = DataPlan(tokens=tokens, bytes_per_token=size, kept=kept, vocab_size=vocab)
    rates = {"clean": StageRate(1e6, 1 / kept), "tokenise": StageRate(2e6, 1.0)}
    one, many = ({w.stage: w.core_hours for w in data_work(p, rates)} for p in (plan, plan.replace(tokens=times * tokens)))
    assert one["clean"] == pytest.approx(tokens * size / kept / 1e6 / 3600)
    assert many == pytest.approx({stage: times * hours for stage, hours in one.items()})
    # Epochs: as much is read, less is prepared and stored.
    again = plan.replace(repeats=times)
    assert data_reading(again) == data_reading(plan)
    assert data_storage(again).tokens == pytest.approx(data_storage(plan).tokens / times)
    assert data_storage(plan).tokens == tokens * (2 if vocab <= 65_536 else 4)
    hours = sum(one.values())
    hosts = prepare_hosts(plan, hours)
    assert (hosts - 1) * 64 * 14 * 24 < hours <= hosts * 64 * 14 * 24


def test_every_number_says_where_it_is_from():
    for field in dataclasses.fields(DataPlan):
        assert field.metadata["origin"] in ORIGINS and field.metadata["what"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tokens": 0}, "DataPlan: `tokens` is 0, want above 0"),
        ({"hours": float("nan")}, "DataPlan: `hours` is nan"),
        ({"kept": 1.5}, "DataPlan: `kept` is 1.5, want at most 1"),
        ({"devices": 2.5}, "DataPlan: `devices` is 2.5, want a whole number"),
        ({"devices": 12}, "DataPlan: 12 devices are not divisible by host_devices=8"),
        ({"speed": 1}, "DataPlan.replace: `fields` is 'speed', want one of"),
    ],
)
def test_plans_that_are_none_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataPlan().replace(**fields)
    with pytest.raises(ValueError, match="data_work: `rates` has .* for 'clean'"):
        data_work(DataPlan(), {"clean": StageRate(0.0, 1.0)})


# Reports

SOURCES = {
    "a": {"read": {"bytes": 600, "documents": 7}, "bytes": 300, "documents": 4, "tokens": 80, "licence": "MIT"},
    "b": {"read": {"bytes": 200}, "bytes": 100, "documents": 1, "tokens": 20},
}
TIMED = {
    "read": {"bytes": 800, "seconds": 1.0, "mb_per_second": 0.0008}, "clean": {"bytes": 800, "seconds": 2.0},
    "sign": {"bytes": 500, "seconds": 0.5}, "scan": {"bytes": 800, "seconds": 4.5},
    "duplicates": {"bytes": 500, "seconds": 0.25}, "tokenise": {"bytes": 400, "seconds": 3.0},
    "shard": {"bytes": 400, "seconds": 3.5},
}  # fmt: skip


def written(tmp_path, report):
    path = tmp_path / "report.json"
    path.write_text(report if isinstance(report, str) else json.dumps(report), encoding="utf-8")
    return path


def test_a_report_with_bytes_and_seconds(tmp_path):
    """The plan for as many tokens as the report has costs what the report's run did, each second once."""
    found = read_rates(written(tmp_path, {"format": 1, "rates": TIMED, "sources": SOURCES}))
    assert found.fields == {"bytes_per_token": 4.0, "document_tokens": 20.0, "kept": 0.5} and found.tokens == 100
    assert list(found.rates) == ["read", "clean", "sign", "scan, the rest", "duplicates", "tokenise", "shard, the rest"]
    assert found.rates["sign"] == StageRate(1000.0, 1.25) and found.rates["scan, the rest"] == StageRate(800.0, 2.0)
    work = data_work(DataPlan(tokens=100).replace(**found.fields), found.rates)
    assert sum(each.core_hours for each in work) * 3600 == pytest.approx(4.5 + 0.25 + 3.5)
    changed = change_kept(found.rates, 0.5, 0.1)
    assert changed["tokenise"] == found.rates["tokenise"] and changed["shard, the rest"].share == 1.0
    assert changed["clean"].share == pytest.approx(10.0) and changed["sign"].share == pytest.approx(6.25)


def test_a_report_with_rates_alone(tmp_path):
    found = read_rates(written(tmp_path, {"rates": {"clean": 3e7, "tokenise": 2_000_000}}))
    assert found.rates == {"clean": StageRate(3e7, 1.0), "tokenise": StageRate(2e6, 1.0)} and not found.fields
    found = read_rates(written(tmp_path, {"rates": {"clean": 3e7, "tokenise": 2_000_000}, "sources": SOURCES}))
    assert found.rates == {"clean": StageRate(3e7, 2.0), "tokenise": StageRate(2e6, 1.0)}


@pytest.mark.parametrize(
    "report, message",
    [
        ("{", "is not JSON"),
        ([1], "has no object 'rates'"),
        ({"rates": {}}, "has no object 'rates'"),
        ({"rates": {"clean": "fast"}}, "has the rate 'fast' for 'clean', want a number above 0"),
        ({"rates": {"clean": True}}, "has the rate True for 'clean'"),
        ({"rates": {"clean": -1}}, "has the rate -1 for 'clean'"),
        ({"rates": {"clean": {"bytes": 1}}}, "has 1 bytes in None seconds for 'clean', want seconds above 0"),
        ({"rates": {"clean": {"bytes": 1, "seconds": 1}}}, "has bytes and seconds, but no 'sources' that say what stays"),
        ({"rates": {"clean": 1}, "sources": {"a": {}}}, "has 'sources' without bytes read"),
        ({"rates": {"clean": 1}, "sources": 3}, "has 'sources' without bytes read"),
        ({"rates": {"clean": 1}, "sources": {}}, "has 'sources' without bytes read"),
    ],
)
def test_a_report_that_is_none_is_refused(tmp_path, report, message):
    with pytest.raises(ValueError, match="^read_rates: ") as error:
        read_rates(written(tmp_path, report))
    assert message in str(error.value) and "\n" not in str(error.value)


# The program

DRIVER = """
import contextlib, io, json, sys
import data_plan
from absl.testing import flagsaver

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = data_plan.main(data_plan.parse_flags(["data_plan.py", *arguments]))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
SHOWN = ["--report=docs/data_report.json", "--set=kept=0.5"]
WHAT_IF = {flags: rest for flags, *rest in re.findall(r"^\| (none|`--[^`]*`) \| ([\d.,]+) \| ([\d,]+) \|$", DOCUMENT, re.M)}
MEASURE = ["--measure", "--tokenizer={tmp}/tokenizer", "--corpus={tmp}/text.txt"]
GOOD = {
    "plain": [], "measured": MEASURE, "both": [*MEASURE, SHOWN[0], "--rate=clean=1e6"],
    "small": ["--preset=tiny", "--set=tokens=1e6", "--rate=tokenise=1e6"],
}  # fmt: skip
BAD = {
    "an argument": (["x"], "argument ['x'], want flags only"),
    "no number": (["--set=kept"], "--set=kept, want name=number, such as kept=0.2"),
    "no field": (["--set=speed=2"], "`fields` is 'speed', want one of"),
    "kept": (["--set=kept=2"], "DataPlan: `kept` is 2.0, want at most 1"),
    "a rate": (["--rate=clean=-1"], "--rate=clean=-1, want a rate above 0"),
    "no report": (["--report=nowhere.json"], "No such file or directory: 'nowhere.json'"),
    "no rates": (["--report={tmp}/text.txt"], "text.txt' is not JSON"),
    "no tokenizer": (["--measure"], "--measure wants --tokenizer"),
    "nothing to measure": (["--corpus=x"], "--tokenizer and --corpus want --measure"),
    "no corpus": ([*MEASURE[:2], "--corpus=nowhere"], "nowhere"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = "A line about whales, ships and the sea.\n" * 50
    (folder / "text.txt").write_text(text, encoding="utf-8")
    save_tokenizer(train_tokenizer([text], 300), folder / "tokenizer")
    changes = [SHOWN[:1] + ([] if flags == "none" else flags.strip("`").split()) for flags in WHAT_IF]
    cases = [*GOOD.values(), SHOWN, *changes, *(arguments for arguments, _ in BAD.values())]
    cases = [[argument.format(tmp=folder) for argument in arguments] for arguments in cases]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases)], capture_output=True, timeout=120, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stdout.decode().splitlines()]
    return dict(zip([*GOOD, "shown", *WHAT_IF, *BAD], found, strict=True))


def test_the_document_shows_what_the_program_prints(results):
    (block,) = re.findall(r"```text\n(.*?)```", DOCUMENT, re.S)
    assert f"python examples/data_plan.py {' '.join(SHOWN)}`" in DOCUMENT
    assert results["shown"] == [0, block, ""]
    assert len(WHAT_IF) >= 5
    for flags, (raw, hours) in WHAT_IF.items():
        out = results[flags][1]
        assert re.search(r"as it comes, compressed\s+([\d.,]+)", out).group(1) == raw, flags
        assert re.search(r"^all\s+([\d,]+)$", out, re.M).group(1) == hours, flags


def test_where_numbers_are_from(results):
    code, out, err = results["plain"]
    assert (code, err) == (0, "") and "no rate is given, so that the cost of preparing is not known" in out
    assert set(re.findall(r"(\w+)$", out.split("\n\n")[0], re.M)) - {"from"} <= {*ORIGINS, ""} and "measured" not in out
    code, out, err = results["measured"]
    first, inputs, _, work, *_ = out.split("\n\n")
    assert (code, err) == (0, "") and re.match(r"measured here: 0.00 MB in 1 documents, [\d,]+ tokens", first)
    assert re.search(r"bytes_per_token .* measured here$", inputs, re.M) and re.search(r"kept .* assumed$", inputs, re.M)
    assert re.search(r"^tokenise .* measured here$", work, re.M)
    inputs, _, work = results["both"][1].split("\n\n")[2:5]
    assert re.search(r"bytes_per_token .* measured, report$", inputs, re.M)
    origins = dict(re.findall(r"^(\w+) .*?%  +(\w.*)$", work, re.M))
    assert [origins[stage] for stage in ("clean", "sign", "tokenise")] == ["given", "measured, report", "measured here"]
    assert "vocab_size" in results["small"][1] and "2 bytes each" in results["small"][1]


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(results, what):
    code, out, err = results[what]
    assert (code, out) == (2, "") and err.count("\n") == 1, (code, out, err)
    assert err.startswith("data_plan: ") and BAD[what][1] in err


def test_the_report_of_the_document_is_one():
    found = read_rates(REPORT)
    assert found.tokens == sum(source["tokens"] for source in json.loads(REPORT.read_text())["sources"].values())
    assert {"clean", "filter", "sign", "duplicates", "tokenise"} <= set(found.rates)
    assert dsv3.preset("deepseek-v3").vocab_size == DataPlan().vocab_size
