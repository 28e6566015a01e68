"""Exchanges between processes, with as many of them as TensorFlow orders otherwise than by number."""

import pytest

from tests.launched import run_clients


@pytest.mark.parametrize(("clients", "devices"), [(11, 1), (2, 12), (3, 2)])
def test_every_device_gets_what_is_meant_for_it(clients, devices):
    run_clients(clients, "tests/parallel/run_exchange.py", [devices])
