"""Exchanges between processes, with as many of them as TensorFlow orders otherwise than by number."""

import os

import pytest

from tests.launched import run_clients

CASES = [(2, 12), (3, 2)]
if "DSV3_MESH_CASES" in os.environ:  # as in `.ci/run`: so many processes take a while to start
    CASES.append((11, 1))


@pytest.mark.parametrize(("clients", "devices"), CASES)
def test_every_device_gets_what_is_meant_for_it(clients, devices):
    run_clients(clients, "tests/parallel/run_exchange.py", [devices])
