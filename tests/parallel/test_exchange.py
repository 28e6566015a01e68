"""Exchanges between processes, with as many of them as TensorFlow orders otherwise than by number."""

import pytest

from tests.launched import run_clients
from tests.more import more

CASES = [(2, 12), *more((3, 2), (11, 1))]  # so many processes take a while to start


@pytest.mark.parametrize(("clients", "devices"), CASES)
def test_every_device_gets_what_is_meant_for_it(clients, devices):
    run_clients(clients, "tests/parallel/run_exchange.py", [devices])
