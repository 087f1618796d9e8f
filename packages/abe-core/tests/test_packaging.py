"""What ships: every distribution is built once, and used from its wheel alone, outside the workspace."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[3]
PROJECTS = sorted([*(path.parent for path in ROOT.glob("packages/*/pyproject.toml")), ROOT / "contract-tests"])
PACKAGES = {project.name: re.sub(r"^abe-core$", "abe", project.name).replace("-", "_") for project in PROJECTS} | {
    "contract-tests": "abe_contract_tests"
}
IDS = [project.name for project in PROJECTS]
EXAMPLE = ROOT / "examples" / "custom_provider"
CONTRACT_HANGS = 900
"""Seconds after which a run of the contract hangs: on a busy machine it takes minutes."""


@dataclass(frozen=True)
class Built:
    """One distribution's files."""

    sdist: Path
    wheel: Path


def outside_environment() -> dict[str, str]:
    """Return this process's environment variables but for those by which the workspace would show."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "REDIS_URL", "ABSTRACT_BACKEND_DEBUG", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS")
    prefixes = ("QUEUE_", "MESSAGE_QUEUE_")
    return {name: value for name, value in os.environ.items() if name not in ours and not name.startswith(prefixes)}


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Run a command outside the workspace's environment and return its standard output."""
    kept = outside_environment() | environment
    done = subprocess.run(list(command), cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def find_uv() -> str:
    """Return the uv that runs us, or one that is at hand."""
    local = ROOT / ".tools" / "uv" / "bin" / "uv"
    found = os.environ.get("UV") or shutil.which("uv") or (str(local) if local.exists() else None)
    assert found is not None, "no uv found: run the tests by `make test`"
    return found


def build(project: Path, target: Path, *options: str) -> list[Path]:
    # The workspace's own hatchling, so that a build asks no package index for one.
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", target, project)
    return sorted(target.iterdir())


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Every distribution: the sdist, and the wheel that is built from the sdist."""
    found = {}
    for project in PROJECTS:
        files = build(project, tmp_path_factory.mktemp(project.name))
        sdist, wheel = sorted(files, key=lambda path: path.suffix == ".whl")
        found[project.name] = Built(sdist, wheel)
    return found


def environment_with(directory: Path, *wheels: Path | str) -> Path:
    """Make a virtual environment that holds the wheels and what they depend on, and return its Python."""
    uv = find_uv()
    run(uv, "venv", "--quiet", "--no-project", "--python", sys.executable, directory)
    python = directory / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--python", python, *wheels]
    try:
        # What the workspace depends on was fetched once; it is asked for again only where it was not kept.
        run(*install, "--offline")
    except AssertionError:
        run(*install)
    return python


@pytest.fixture(scope="session")
def core_alone(built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(tmp_path_factory.mktemp("clean") / "core", built["abe-core"].wheel)


@pytest.fixture(scope="session")
def with_providers(built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheels = [built["abe-core"].wheel, *(built[f"abe-backend-{name}"].wheel for name in PROVIDERS)]
    return environment_with(tmp_path_factory.mktemp("clean") / "providers", *wheels)


PROVIDERS: dict[str, dict[str, str]] = {
    "rabbitmq": {},
    "redis": {"REDIS_URL": "redis://localhost:6379/0"},
    "sqs": {"AWS_REGION": "eu-central-1"},
}
"""The providers here, and what each has to be told."""

LOAD = textwrap.dedent("""
    import json, sys, warnings
    from abe.backends.message_queue.loader import load_backend
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backend = load_backend()
    print(json.dumps({
        "class": type(backend).__name__,
        "module": type(backend).__module__.partition(".")[0],
        "file": sys.modules[type(backend).__module__.partition(".")[0]].__file__,
        "warnings": [each.category.__name__ for each in caught],
    }))
""")

APPLICATION = textwrap.dedent("""
    from abe.backends.message_queue.consumer import AsyncLoopConsumer
    from abe.backends.message_queue.loader import load_backend
    from abe.types import JSONDict, MessageQueueMessage


    async def handle(event: JSONDict) -> None:
        print(event["order_id"])


    async def main() -> None:
        backend = load_backend()
        await backend.publish("orders.created", {"order_id": "o-1"})
        async for message in backend.consume(group="billing"):
            first: MessageQueueMessage = message
            print(first["order_id"])
            break
        await AsyncLoopConsumer(backend, "billing").run(handle)
""")


BROKER_APPLICATION = textwrap.dedent("""
    from abe import FullBackend, load_backend


    async def main() -> None:
        async with load_backend() as backend:
            await backend.publish("orders.created", {"order_id": "o-1"}, headers={"tenant": "acme"}, delay=0.5)
            async with backend.consume(group="billing", keys=["orders.*"]) as messages:
                async for message in messages:
                    print(message.key, message["order_id"], message.headers["tenant"], message.attempt)
                    await message.nack(delay=1.0)
                    break
            letters = backend.dead_letters("billing")
            for letter in await letters.list():
                print(letter.id, letter.reason, letter.attempts)
            count: int = await letters.replay_all()
            print(count)


    def own() -> FullBackend:
        from abe_backend_redis import RedisBackend, RedisSettings

        return RedisBackend(RedisSettings(url="redis://localhost:6379/0", lease=10.0))
""")


@pytest.mark.parametrize("name", IDS)
def test_a_wheel_holds_its_package_and_the_marker_of_types(built: dict[str, Built], name: str) -> None:
    names = contents(built[name].wheel)
    package = PACKAGES[name]
    assert f"{package}/py.typed" in names
    assert f"{package}/__init__.py" in names
    tops = {each.partition("/")[0] for each in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {package}
    assert any(each.endswith(".dist-info/licenses/LICENSE") for each in names)


@pytest.mark.parametrize("name", [name for name in IDS if name != "contract-tests"])
def test_a_wheel_holds_no_tests(built: dict[str, Built], name: str) -> None:
    files = [Path(each) for each in contents(built[name].wheel)]
    assert [path for path in files if "tests" in path.parts or path.name.startswith(("test_", "conftest"))] == []


@pytest.mark.parametrize("project", PROJECTS, ids=IDS)
def test_the_sdist_builds_to_the_same_wheel_as_the_tree(built: dict[str, Built], project: Path, tmp_path: Path) -> None:
    (wheel,) = build(project, tmp_path, "--wheel")
    assert contents(wheel) == contents(built[project.name].wheel)


@pytest.mark.parametrize("name", IDS)
def test_an_sdist_brings_its_tests(built: dict[str, Built], name: str) -> None:
    with tarfile.open(built[name].sdist) as archive:
        names = [each.partition("/")[2] for each in archive.getnames()]
    assert any(each.startswith("tests/test_") for each in names)


@pytest.mark.parametrize("name", IDS)
def test_versions_are_the_same_everywhere(built: dict[str, Built], name: str) -> None:
    version = built[name].wheel.name.split("-")[1]
    assert version == built["abe-core"].wheel.name.split("-")[1]


def test_core_alone_gives_the_memory_backend_with_a_warning(core_alone: Path) -> None:
    loaded = json.loads(run(core_alone, "-I", "-c", LOAD))
    assert loaded["class"] == "MemoryBackend"
    assert loaded["warnings"] == ["UserWarning"]
    assert Path(loaded["file"]).is_relative_to(core_alone.parents[1])


def test_core_alone_depends_on_one_package(core_alone: Path) -> None:
    listed = run(find_uv(), "pip", "list", "--quiet", "--format", "json", "--python", core_alone)
    assert {each["name"] for each in json.loads(listed)} == {"abe-core", "msgspec"}


def check_types(checker: str, python: Path, application: str, directory: Path) -> None:
    """Check an application strictly, in the environment of the Python given."""
    (directory / "application.py").write_text(application)
    if checker == "mypy":
        found = ["mypy", "--strict", "--python-executable", python, "--cache-dir", directory / "cache"]
    else:
        (directory / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict"}))
        found = ["pyright", "--pythonpath", python]
    run(sys.executable, "-m", *found, "application.py", cwd=directory)


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_an_application_type_checks_strictly_against_the_wheel(core_alone: Path, tmp_path: Path, checker: str) -> None:
    check_types(checker, core_alone, APPLICATION, tmp_path)


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_an_application_type_checks_strictly_against_a_provider(
    with_providers: Path, tmp_path: Path, checker: str
) -> None:
    check_types(checker, with_providers, BROKER_APPLICATION, tmp_path)


@pytest.mark.parametrize("package", ["abe", *(f"abe_backend_{name}" for name in PROVIDERS)])
def test_every_public_type_is_known(with_providers: Path, tmp_path: Path, package: str) -> None:
    # Given no project, pyright looks into the environment of the first Python on the path.
    path = f"{with_providers.parent}{os.pathsep}{os.environ['PATH']}"
    told = run(sys.executable, "-m", "pyright", "--verifytypes", package, "--ignoreexternal", cwd=tmp_path, PATH=path)
    assert "Type completeness score: 100%" in told
    assert f'Symbols exported by "{package}": 0' not in told


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_is_found_by_its_name(with_providers: Path, name: str) -> None:
    loaded = json.loads(run(with_providers, "-I", "-c", LOAD, QUEUE_BACKEND=name, **PROVIDERS[name]))
    assert loaded["module"] == f"abe_backend_{name}"
    assert loaded["class"].lower() == f"{name}backend"
    assert loaded["warnings"] == []
    assert Path(loaded["file"]).is_relative_to(with_providers.parents[1])


HARNESSES = textwrap.dedent("""
    import json
    from importlib.metadata import entry_points
    from abe_contract_tests.selection import ENTRY_POINTS, load_harness
    found = {each.name: load_harness(each.name) for each in entry_points(group=ENTRY_POINTS)}
    print(json.dumps({name: harness.backend.__module__.partition(".")[0] for name, harness in found.items()}))
""")


def test_the_wheels_bring_the_harness_of_each_provider(built: dict[str, Built], tmp_path: Path) -> None:
    wheels = {f"abe-backend-{name}[test]": built[f"abe-backend-{name}"].wheel for name in PROVIDERS}
    extras = [f"{name} @ {wheel.as_uri()}" for name, wheel in wheels.items()]
    python = environment_with(tmp_path / "harnesses", built["abe-core"].wheel, built["contract-tests"].wheel, *extras)
    found = json.loads(run(python, "-I", "-c", HARNESSES))
    assert set(found.values()) == {"abe", *(f"abe_backend_{name}" for name in PROVIDERS)}
    assert {"memory", "rabbitmq", "redis", "sqs-moto", "sqs-ministack"} <= set(found)


@pytest.fixture(scope="session")
def with_suite(built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite and a provider that the project did not write, as a third party installs them."""
    (example,) = build(EXAMPLE, tmp_path_factory.mktemp("example"), "--wheel")
    wheels = [built["abe-core"].wheel, built["contract-tests"].wheel, example]
    # As in the workspace, pytest-xdist is one that this pytest knows.
    tools = [f"{name}=={version(name)}" for name in ("pytest", "pytest-xdist", "blockbuster")]
    return environment_with(tmp_path_factory.mktemp("clean") / "contract", *wheels, *tools)


@pytest.mark.xdist_group("contract-from-wheels")
@pytest.mark.parametrize(("name", "evidence"), [("memory", "in process"), ("sqlite", "real broker")])
def test_the_contract_holds_from_wheels_alone(with_suite: Path, tmp_path: Path, name: str, evidence: str) -> None:
    report = tmp_path / "report.json"
    command = [with_suite, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n", "4", "--dist", "worksteal"]
    command += ["-c", os.devnull, f"--rootdir={tmp_path}", "--pyargs", "abe_contract_tests.suite"]
    command += ["--contract", name, "--contract-strict", f"--contract-report={report}"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=outside_environment(),
        capture_output=True,
        text=True,
        timeout=CONTRACT_HANGS,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    (verdict,) = json.loads(report.read_text())["providers"]
    failed = {entry["id"]: entry["detail"] for entry in verdict["clauses"] if entry["status"] in ("failed", "not run")}
    assert not failed, done.stdout
    assert (verdict["verdict"], verdict["harness"], verdict["evidence"]) == ("PASS", name, evidence)
    assert done.returncode == 0, done.stdout
