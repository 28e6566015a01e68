"""Run as one of several clients by test_exchange.py: exchanges among all devices, each of which knows what it must get.

Usage: run_exchange.py DEVICES
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import tensorflow as tf

from dsv3.parallel.clients import start_clients
from dsv3.parallel.collectives import all_to_all, gather_mesh
from dsv3.parallel.groups import mesh_groups
from dsv3.parallel.mesh import make_mesh


def main(devices: int) -> None:
    """One client."""
    with start_clients(devices) as clients:
        ways = clients.count * devices
        mesh = make_mesh({"expert": ways})
        (group,) = mesh_groups(mesh, ("expert",))
        sent = [tf.range(ways, dtype=tf.float32)[:, None] + 1000.0 * member.place for member in group.here]
        for member, got in zip(group.here, all_to_all(sent, (group,))):
            np.testing.assert_array_equal(got[:, 0], np.arange(ways) * 1000 + member.place)
        found = gather_mesh([tf.constant(member.place) for member in group.here], mesh)
        np.testing.assert_array_equal(found.reshape(-1), np.arange(ways))


if __name__ == "__main__":
    main(int(sys.argv[1]))
