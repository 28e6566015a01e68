"""Problems from files; each row that cannot be used is named by file and line."""

import gzip
import json

import pytest

from dsv3.rl.problems import Problem, read_gsm8k, read_humaneval, read_math, read_rows
from dsv3.rl.reward_code import CallTests

GSM = {"question": "6 * 7?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}
MATHS = {"problem": "x?", "solution": r"so \boxed{\frac{1}{2}}"}
ROW = {"prompt": "6 * 7?", "reference": "42"}
CODE = {"prompt": "def f(x):\n", "test": "assert f(1)", "entry_point": "f", "canonical_solution": "    return x\n"}


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_rows(tmp_path):
    file = write(tmp_path / "a.jsonl", GSM, "\n", {**GSM, "answer": "#### 1,080 "})
    first, second = read_gsm8k(file)
    assert first == Problem("6 * 7?", "42", f"{file}:1", GSM["answer"]) and second[1:3] == ("1,080", f"{file}:3")
    file = write(tmp_path / "b.jsonl", MATHS, {**MATHS, "answer": " 7 "}, {**MATHS, "answer": 0})
    assert [problem.reference for problem in read_math(file)] == [r"\frac{1}{2}", "7", "0"]
    file = write(tmp_path / "c.jsonl", CODE)
    want = Problem(CODE["prompt"], CallTests("assert f(1)", "f", CODE["prompt"]), f"{file}:1", "    return x\n")
    assert read_humaneval(file) == [want]
    file = write(tmp_path / "e.jsonl", ROW, "\n", {"prompt": ["a?", "b?"], "reference": 0, "more": 1})
    assert read_rows(file) == [Problem("6 * 7?", "42", f"{file}:1"), Problem("a?", 0, f"{file}:3", turns=("b?",))]
    file = write(tmp_path / "d.jsonl", {"q": "1?", "a": "#### 1"})
    assert read_gsm8k(file, question="q", answer="a")[0][:2] == ("1?", "1")


def test_a_folder_of_mathematics(tmp_path):
    """As MATH is published: a folder for each subject, a file for each problem, which may be of many lines."""
    for place, answer in (("geometry/2.json", "2"), ("algebra/10.json", "10"), ("algebra/1.json", "1")):
        file = tmp_path / "train" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"problem": "x?", "level": "Level 1", "solution": rf"\boxed{{{answer}}}"}, indent=1))
    (tmp_path / "train" / "README").write_text("no problem")
    found = read_math(tmp_path / "train")
    assert [problem.reference for problem in found] == ["1", "10", "2"]
    assert found[1] == Problem("x?", "10", str(tmp_path / "train" / "algebra" / "10.json"), r"\boxed{10}")
    (tmp_path / "train" / "algebra" / "10.json").write_text('{"problem": "x?"}')
    with pytest.raises(ValueError, match="read_math: '.*/train/algebra/10.json': there is no 'answer', want one"):
        read_math(tmp_path / "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="read_math: the folder '.*empty' holds no .json file, want one for each problem"):
        read_math(tmp_path / "empty")
    with pytest.raises(IsADirectoryError):
        read_gsm8k(tmp_path / "train")


def test_compressed(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    data = gzip.compress(json.dumps(GSM).encode())
    file.write_bytes(data)
    assert read_gsm8k(file)[0].reference == "42"
    file.write_bytes(data[:-12])
    with pytest.raises(ValueError, match="read_gsm8k: '.*a.jsonl.gz' is cut off or damaged"):
        read_gsm8k(file)


@pytest.mark.parametrize(
    "read, row, message",
    [
        (read_gsm8k, {"question": "a?"}, "there is no 'answer', want one among 'question'"),
        (read_gsm8k, {**GSM, "answer": "42"}, "'answer' ends with '42', want an answer behind '####'"),
        (read_gsm8k, {**GSM, "answer": "a\n####  "}, "want an answer behind '####'"),
        (read_gsm8k, {**GSM, "answer": None}, "'answer' is None, want a text"),
        (read_gsm8k, {**GSM, "question": " "}, "'question' is ' ', want a text"),
        (read_math, {"problem": "x?"}, "there is no 'answer', want one among 'problem'"),
        (read_math, {**MATHS, "answer": ""}, "'answer' is '', want a text"),
        (read_math, {**MATHS, "solution": r"so \boxed{1"}, "'solution' has no box, want the answer in"),
        (read_humaneval, {**CODE, "test": ""}, "'test' is '', want a text"),
        (read_humaneval, {"prompt": "x", "test": "y"}, "there is no 'entry_point'"),
        (read_rows, {"question": "a?"}, "there is no 'prompt', want one among 'question'"),
        (read_rows, {"prompt": "a?"}, "there is no 'reference', want one among 'prompt'"),
        (read_rows, {**ROW, "prompt": " "}, "'prompt' is ' ', want a text or a list of texts"),
        (read_rows, {**ROW, "prompt": []}, "'prompt' is [], want a text or a list of texts"),
        (read_rows, {**ROW, "prompt": ["a?", 1]}, "'prompt' is ['a?', 1], want a text or a list of texts"),
        (read_rows, {**ROW, "reference": None}, "'reference' is None, want what an answer is judged by"),
        (read_rows, {**ROW, "reference": " "}, "'reference' is ' ', want what an answer is judged by"),
        (read_rows, {**ROW, "reference": {}}, "'reference' is {}, want what an answer is judged by"),
        (read_gsm8k, "{\n", "is no JSON"),
        (read_gsm8k, "[1]\n", "is of type list, want an object"),
    ],
)
def test_bad_rows_are_named(tmp_path, read, row, message):
    good = {read_gsm8k: GSM, read_math: MATHS, read_humaneval: CODE, read_rows: ROW}[read]
    file = write(tmp_path / "rows.jsonl", good, row)
    with pytest.raises(ValueError) as error:
        read(file)
    assert str(error.value).startswith(f"{read.__name__}: {str(file)!r} line 2") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_without_rows(tmp_path):
    with pytest.raises(ValueError, match="read_math: '.*e.jsonl' is empty, want rows"):
        read_math(write(tmp_path / "e.jsonl", "\n"))
    with pytest.raises(FileNotFoundError):
        read_math(tmp_path / "none.jsonl")
