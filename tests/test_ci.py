"""`.ci/run` knows which files have more cases than a plain run takes."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_files_with_long_cases_are_run_with_them():
    listed = re.findall(r"\btests/[\w/]+\.py\b", "".join(re.findall(r'^more\+?=".*"', (ROOT / ".ci/run").read_text(), re.M)))
    users = {
        str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")
        if re.search(r"^from tests\.more import ", path.read_text(encoding="utf-8"), re.M)
    }  # fmt: skip
    assert len(listed) == len(set(listed)) > 20 and all((ROOT / name).exists() for name in listed)
    assert users <= set(listed)
