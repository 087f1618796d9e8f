"""The examples do what they say, on real brokers."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from abe_contract_tests.services import Service, rabbitmq_service, redis_service, sqs_service

ROOT = Path(__file__).parents[2]
BOUND = 600
"""Seconds after which one hangs; each takes a few."""


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


@pytest.fixture(scope="module")
def sqs() -> Iterator[Service]:
    service = sqs_service("ministack")
    service.start()
    yield service
    service.stop()


AWS = {"AWS_REGION": "eu-north-1", "AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "mine"}
VARIABLES = {"redis": "REDIS_URL", "rabbitmq": "RABBITMQ_URL", "sqs": "AWS_ENDPOINT_URL"}


def at(backend: str, service: Service) -> dict[str, str]:
    """Return what a backend has to be told to find its broker there."""
    return {VARIABLES[backend]: service.url} if backend != "sqs" else AWS | {VARIABLES[backend]: service.url}


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    # Whatever this machine says about AWS is not for the examples.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**kept, **environ},
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


@pytest.mark.thorough
@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("backend", VARIABLES)
def test_the_demo_tells_its_story_on_a_broker(backend: str, request: pytest.FixtureRequest) -> None:
    service: Service = request.getfixturevalue(backend)
    done = run("examples/demo.py", "--backend", backend, **at(backend, service))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing left in the broker" in done.stdout


@pytest.mark.thorough
@pytest.mark.xdist_group("examples")
def test_the_demo_starts_the_broker_that_no_variable_names() -> None:
    variables = {"RABBITMQ_URL": "", "ABE_TEST_RABBITMQ_URL": "", "ABE_TEST_SERVICES": "processes"}
    done = run("examples/demo.py", "--backend", "rabbitmq", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RABBITMQ_URL is not set: a private RabbitMQ" in done.stdout


@pytest.mark.thorough
@pytest.mark.xdist_group("examples")
def test_the_demo_starts_the_sqs_that_no_variable_names() -> None:
    done = run("examples/demo.py", "--backend", "sqs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_SQS are not set: a private ministack" in done.stdout


@pytest.mark.thorough
@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize(
    ("environ", "seen"),
    [
        ({}, ["demo", "demo", "us-east-1"]),
        (AWS, ["mine", "mine", "eu-north-1"]),
        ({"AWS_DEFAULT_REGION": "eu-north-1"}, ["demo", "demo", None]),
        ({"AWS_PROFILE": "work"}, [None, None, None]),
    ],
    ids=["nothing", "account", "region", "profile"],
)
def test_the_demo_s_private_sqs_changes_nothing_that_is_said_about_aws(
    environ: dict[str, str], seen: list[str]
) -> None:
    names = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"]
    script = (
        f"import os, sys; sys.path.insert(0, 'examples'); import demo\nwith demo.broker('sqs'):\n"
        f"    print([os.environ.get(name) for name in {names}])"
    )
    done = run("-c", script, **environ)
    assert done.stdout.splitlines()[-1] == str(seen), done.stderr


@pytest.mark.thorough
@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("backend", VARIABLES)
def test_a_consumer_killed_at_work_loses_nothing(backend: str, request: pytest.FixtureRequest) -> None:
    service: Service = request.getfixturevalue(backend)
    done = run("examples/sigkill.py", "--backend", backend, **at(backend, service))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SIGKILL: .*\d+.*billing", done.stdout)
    assert re.search(r"^Published: (\d+) of \1 confirmed$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"lost 0", done.stdout)) == 2


@pytest.mark.thorough
@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("readme", ["README.md", "packages/abe-backend-{}/README.md"])
@pytest.mark.parametrize("backend", VARIABLES)
def test_the_readmes_first_example_does_on_its_broker_what_it_says(
    backend: str, readme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    service: Service = request.getfixturevalue(backend)
    text = (ROOT / readme.format(backend)).read_text()
    (tmp_path / "example.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    environ = at(backend, service) | {"QUEUE_BACKEND": backend, "QUEUE_NAMESPACE": f"readme-{uuid4().hex[:8]}"}
    done = run("-W", "error", str(tmp_path / "example.py"), **environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("shipped 1\n" if "{}" in readme else "billing Order(order_id=17, cents=1099)\n")


def test_the_example_of_a_provider_is_as_short_as_the_guide_says() -> None:
    (claimed,) = re.findall(
        r"examples/custom_provider\), (\d+) lines in all", (ROOT / "docs" / "PROVIDERS.md").read_text()
    )
    modules = [path for path in ROOT.glob("examples/custom_provider/src/*/*.py") if path.name != "harness.py"]
    assert 0 < sum(len(path.read_text().splitlines()) for path in modules) <= int(claimed)
