"""Settings of every test run: the CPU as eight devices, two threads, and property sweeps that draw the same examples."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a program that crashes says where
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

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


def pytest_collection_modifyitems(items):
    """Puts the folder with the longest files first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: "train" not in item.path.parts)
