"""How the project's tests are spread over the processes of pytest-xdist, which ``--dist=loadgroup`` does by groups; and
Hypothesis takes the time it takes."""

import zlib

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

SHARED_BY = {"rabbitmq": 3, "sqs-ministack": 4, "sqs-moto": 4, "sqs-fifo": 4, "sqs-sns": 4}
"""Into how many groups the contract's tests on a broker go: so many processes at most start one of their own."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the contract's tests on one broker together: a node of RabbitMQ costs as much as ten of them."""
    for item in items:
        harness = (
            item.callspec.params.get("contract_harness")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        if harness in SHARED_BY:
            share = zlib.crc32(item.nodeid.encode()) % SHARED_BY[harness]
            item.add_marker(pytest.mark.xdist_group(f"{harness}-{share}"))
