"""Settings of every test run: the CPU as eight devices, two threads, and property sweeps that draw the same examples."""

import gc
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a program that crashes says where
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import pytest
import tensorflow as tf
from hypothesis import Phase, settings

tf.config.threading.set_inter_op_parallelism_threads(2)
tf.config.threading.set_intra_op_parallelism_threads(2)
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 8)  # for meshes

# The number of examples is each sweep's own choice: what traces or compiles anew for every shape draws few.
# Without the phase that explains failures: it traces every line, also while tests pass, and takes most of the time.
phases = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile("dsv3", deadline=None, derandomize=True, database=None, phases=phases)
settings.load_profile("dsv3")


@pytest.fixture
def own_garbage():
    """A collection looks at what this test has made: what others have left are millions of objects, and takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


# Two runs, one after the other: the first writes the ids of what it has passed, the second leaves those out, GROWS apart.
WRITTEN, READ = (os.environ.get(f"DSV3_PASSED_{way}") for way in ("TO", "FROM"))
passed: list[str] = []


def pytest_collection_modifyitems(config, items):
    """Puts the folder with the longest files first, so that no process is left with one of them at the end."""
    known = set(Path(READ).read_text().splitlines()) if READ and Path(READ).exists() else set()
    done = {item for item in items if item.nodeid in known and item.get_closest_marker("grows") is None}
    config.hook.pytest_deselected(items=list(done))
    items[:] = sorted((item for item in items if item not in done), key=lambda item: "train" not in item.path.parts)


def pytest_runtest_logreport(report):
    if WRITTEN and report.when == "call" and report.passed:
        passed.append(report.nodeid)


def pytest_sessionfinish(session):
    if WRITTEN and not hasattr(session.config, "workerinput"):  # of several processes the one that has all reports
        Path(WRITTEN).write_text("".join(f"{node}\n" for node in passed))
