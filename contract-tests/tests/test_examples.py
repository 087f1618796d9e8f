"""The examples do what they say, on real brokers."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from abe_contract_tests.services import Service, rabbitmq_service, redis_service

ROOT = Path(__file__).parents[2]
BOUND = 120
"""Seconds; each takes a few."""


@pytest.fixture(scope="module")
def redis() -> Iterator[Service]:
    service = redis_service()
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[Service]:
    service = rabbitmq_service()
    service.start()
    yield service
    service.stop()


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )


@pytest.mark.xdist_group("examples")
def test_the_demo_tells_its_story_in_memory() -> None:
    done = run("examples/demo.py", "--backend", "memory")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing left in the broker" in done.stdout


@pytest.mark.xdist_group("examples")
def test_the_demo_tells_its_story_on_a_real_redis(redis: Service) -> None:
    done = run("examples/demo.py", "--backend", "redis", REDIS_URL=redis.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing left in the broker" in done.stdout


@pytest.mark.xdist_group("examples")
def test_the_demo_tells_its_story_on_a_real_rabbitmq(rabbitmq: Service) -> None:
    done = run("examples/demo.py", "--backend", "rabbitmq", RABBITMQ_URL=rabbitmq.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing left in the broker" in done.stdout


@pytest.mark.xdist_group("examples")
def test_the_demo_starts_the_broker_that_no_variable_names() -> None:
    variables = {"RABBITMQ_URL": "", "ABE_TEST_RABBITMQ_URL": "", "ABE_TEST_SERVICES": "processes"}
    done = run("examples/demo.py", "--backend", "rabbitmq", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RABBITMQ_URL is not set: a private RabbitMQ" in done.stdout


@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize(("backend", "variable"), [("redis", "REDIS_URL"), ("rabbitmq", "RABBITMQ_URL")])
def test_a_consumer_killed_at_work_loses_nothing(backend: str, variable: str, request: pytest.FixtureRequest) -> None:
    service: Service = request.getfixturevalue(backend)
    done = run("examples/sigkill.py", "--backend", backend, **{variable: service.url})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SIGKILL: .*\d+.*billing", done.stdout)
    assert re.search(r"^Published: (\d+) of \1 confirmed$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"lost 0", done.stdout)) == 2


@pytest.mark.xdist_group("examples")
def test_the_readme_s_first_example_runs_as_written(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (tmp_path / "example.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    done = run("-W", "error", str(tmp_path / "example.py"), QUEUE_BACKEND="memory")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "billing Order(order_id=17, cents=1099)\n"
