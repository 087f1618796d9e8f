"""The tests are spread over processes as the project's conftest.py says."""

import os

import pytest


@pytest.mark.xdist_group("together")
def test_the_groups_of_tests_are_known_to_what_spreads_them(request: pytest.FixtureRequest) -> None:
    # With a pytest that pytest-xdist does not know yet they were lost in silence, and each process started brokers of its own.
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    assert alone or request.node.nodeid.endswith("@together")
