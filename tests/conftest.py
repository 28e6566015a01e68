"""Settings of every test run: the CPU, two threads, and property sweeps that draw the same examples each time."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import tensorflow as tf
from hypothesis import settings

tf.config.threading.set_inter_op_parallelism_threads(2)
tf.config.threading.set_intra_op_parallelism_threads(2)

# The number of examples is each sweep's own choice: what traces or compiles anew for every shape draws few.
settings.register_profile("dsv3", deadline=None, derandomize=True, database=None)
settings.load_profile("dsv3")
