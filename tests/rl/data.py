"""Where the real data of tests is, see CONTRIBUTING.md."""

from tests.real_data import DATA

GSM8K = [DATA / "gsm8k" / f"{split}.jsonl" for split in ("train", "test")]
MATH = DATA / "math500" / "test.jsonl"
HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl.gz"
