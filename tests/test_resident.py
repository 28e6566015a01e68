"""The memory of this process, as the system tells it."""

import numpy as np
import pytest

from dsv3 import resident
from dsv3.resident import available_bytes, measure_growth, peak_bytes, reset_peak, resident_bytes

MB = 1 << 20


def test_what_is_held_and_what_was(own_garbage):
    """NumPy's large arrays come from the system and go back to it. Other threads may take or give a megabyte meanwhile."""

    def work():
        np.ones(100 * MB, np.uint8)
        return np.ones(40 * MB, np.uint8)

    kept, growth = measure_growth(work)
    assert abs(growth.peak - 100 * MB) < 8 * MB and abs(growth.kept - 40 * MB) < 8 * MB
    before = resident_bytes()
    assert peak_bytes() >= before
    del kept
    assert abs(before - reset_peak() - 40 * MB) < 8 * MB and peak_bytes() - resident_bytes() < 8 * MB
    _, growth = measure_growth(lambda: None)
    assert growth.peak < 8 * MB and growth.kept < 8 * MB


def test_what_is_left_is_what_the_machine_or_the_group_has(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "_PROC", tmp_path)
    monkeypatch.setattr(resident, "_GROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    5 kB\n")
    assert available_bytes() == 5 * 1024
    for limit, want in [("max", 5 * 1024), ("4000", 1000), ("9999", 5 * 1024), ("2000", 0)]:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("3000\n")
        assert available_bytes() == want
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\n")
    with pytest.raises(OSError, match="has no line MemAvailable"):
        available_bytes()
