"""The scripts behind the make targets and continuous integration."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for path in [*ROOT.glob("scripts/*"), *ROOT.glob("scripts/ci/*"), ROOT / ".ci/run"]
    if path.is_file() and path.read_bytes().startswith(b"#!")
)
IDS = [str(path.relative_to(ROOT)) for path in SCRIPTS]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(command), cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project that holds the scripts and nothing else."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    return tmp_path


@pytest.fixture
def idle() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def write_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_a_script_is_executable_and_parses(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", script).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=IDS)
def test_a_script_names_no_host_and_says_what_it_is_for(script: Path) -> None:
    text = script.read_text()
    assert re.findall(r"\b(?:[a-z0-9-]+\.)+(?:com|org|net|io|dev)\b", text.replace("docker.io ", "docker ")) == []
    assert text.splitlines()[1].startswith("# ")


def test_help_lists_the_commands() -> None:
    listed = run("make", "--no-print-directory", "help").stdout
    for command in ("demo", "sigkill", "test", "test-all", "check", "containers", "contract", "bench"):
        assert f"make {command} " in listed


def test_the_compose_file_publishes_on_the_loopback_address_only() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    ports = re.findall(r'^ +- "(.*:\d+)"$', text, flags=re.MULTILINE)
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_workflow_may_only_read() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "permissions:\n  contents: read\n" in text
    assert all(re.fullmatch(r"[\w./-]+@v\d+", use) for use in re.findall(r"uses: (\S+)", text))


class TestAptInstall:
    def test_it_does_nothing_when_nothing_is_missing(self) -> None:
        if shutil.which("dpkg-query") is None:
            pytest.skip("no Debian packages on this system")
        done = run(ROOT / "scripts/ci/apt-install", "dpkg", "base-files")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_it_says_what_to_install_where_it_may_not(self, tmp_path: Path) -> None:
        write_executable(tmp_path / "id", "#!/bin/sh\necho 1000\n")
        write_executable(tmp_path / "sudo", "#!/bin/sh\nexit 1\n")
        write_executable(tmp_path / "apt-get", "#!/bin/sh\nexit 1\n")
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = run(ROOT / "scripts/ci/apt-install", "no-such-package-of-ours", PATH=path)
        assert done.returncode == 1
        assert "apt-get install no-such-package-of-ours" in done.stderr


class TestNoServices:
    """`apt-install --no-services` with a package manager that looks whether services may start."""

    def install(self, tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
        policy = tmp_path / "policy-rc.d"
        script = tmp_path / "apt-install"
        text = (ROOT / "scripts/ci/apt-install").read_text()
        assert "policy=/usr/sbin/policy-rc.d\n" in text
        write_executable(script, text.replace("/usr/sbin/policy-rc.d", str(policy)))
        write_executable(tmp_path / "bin/id", "#!/bin/sh\necho 0\n")
        write_executable(tmp_path / "bin/apt-get", f'#!/bin/sh\n{policy}; echo "policy says $?"\n')
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return run(script, "--no-services", "no-such-package-of-ours", PATH=path), policy

    def test_nothing_may_start_while_it_installs_and_all_may_afterwards(self, tmp_path: Path) -> None:
        done, policy = self.install(tmp_path)
        assert done.returncode == 0, done.stderr
        assert "policy says 101" in done.stdout
        assert not policy.exists()

    def test_a_policy_of_the_system_s_own_stays(self, tmp_path: Path) -> None:
        write_executable(tmp_path / "policy-rc.d", "#!/bin/sh\nexit 7\n")
        done, policy = self.install(tmp_path)
        assert "policy says 7" in done.stdout
        assert policy.read_text().endswith("exit 7\n")


class TestNames:
    @pytest.mark.parametrize("script", ["brokers", "offline-images"])
    def test_an_unknown_broker_is_refused_with_the_names(self, tree: Path, script: str) -> None:
        write_executable(tree / "scripts/ci/docker-engine", "#!/bin/sh\n")
        done = run(tree / "scripts/ci" / script, "pigeons")
        assert done.returncode == 2
        assert "redis" in done.stderr
        assert "rabbitmq" in done.stderr

    @pytest.mark.parametrize("image", ["redis:7", "rabbitmq:3", f"motoserver/moto:{version('moto')}"])
    def test_an_image_is_the_same_everywhere(self, image: str) -> None:
        """Of moto, whose image has the version of the package, it is the one that is locked."""
        services = "contract-tests/src/abe_contract_tests/services"
        for path in ("scripts/ci/offline-images", "docker-compose.yml", services):
            files = [ROOT / path] if (ROOT / path).is_file() else sorted((ROOT / path).glob("*.py"))
            assert any(re.search(rf"{re.escape(image)}(?![\w.])", each.read_text()) for each in files), path


class TestMake:
    """What make would run, with an environment that is there already."""

    def plan(self, *arguments: str) -> str:
        done = run("make", "--no-print-directory", "--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @pytest.mark.parametrize("target", ["demo", "sigkill"])
    @pytest.mark.parametrize("backend", ["redis", "rabbitmq", "sqs"])
    def test_an_example_has_the_server_installed_that_it_needs(self, target: str, backend: str) -> None:
        plan = self.plan(target, f"BACKEND={backend}")
        assert f"python examples/{target}.py --backend {backend}\n" in plan
        installed = re.findall(r"scripts/ci/brokers *(.*)", plan)
        assert installed == ([] if backend == "sqs" else [backend])

    def test_containers_has_an_image_for_each_broker(self) -> None:
        plan = self.plan("containers")
        assert "scripts/ci/offline-images rabbitmq redis sqs-moto\n" in plan
        assert "--contract redis --contract rabbitmq --contract sqs-moto" in plan

    def test_the_tests_of_minutes_prove_each_provider_on_one_harness(self) -> None:
        (command,) = (line for line in self.plan("test").splitlines() if " pytest " in line)
        assert '-m "not thorough"' in command
        assert "contract_harnesses=memory redis rabbitmq sqs-ministack" in command
        (command,) = (line for line in self.plan("test-all").splitlines() if " pytest " in line)
        assert "thorough" not in command
        assert "harnesses" not in command

    def test_the_contract_runs_on_the_event_loop_that_is_asked_for(self) -> None:
        assert "--contract redis --contract-loop uvloop" in self.plan("contract", "CONTRACT=redis", "LOOP=uvloop")
        assert "--contract-loop" not in self.plan("contract")

    def test_containers_builds_what_is_asked_for(self) -> None:
        plan = self.plan("containers", "CONTRACT=rabbitmq")
        assert "scripts/ci/offline-images rabbitmq\n" in plan


class TestDockerEngine:
    def test_it_wants_to_know_what_to_do(self) -> None:
        done = run(ROOT / "scripts/ci/docker-engine")
        assert done.returncode == 2
        assert "start|stop" in done.stderr

    def test_stop_spares_a_process_that_is_no_engine(self, tree: Path, idle: subprocess.Popen[bytes]) -> None:
        (tree / ".tools").mkdir()
        (tree / ".tools/dockerd.pid").write_text(f"{idle.pid}\n")
        assert run(tree / "scripts/ci/docker-engine", "stop").returncode == 0
        assert idle.poll() is None
        assert not (tree / ".tools/dockerd.pid").exists()

    def test_stop_without_a_start_does_nothing(self, tree: Path) -> None:
        done = run(tree / "scripts/ci/docker-engine", "stop")
        assert (done.returncode, done.stdout) == (0, "")


class TestBootstrap:
    def test_it_takes_the_uv_on_the_path(self, tree: Path) -> None:
        write_executable(tree / "bin/uv", "#!/bin/sh\nexit 0\n")
        done = run(tree / "scripts/bootstrap", PATH=f"{tree / 'bin'}:{os.environ['PATH']}")
        assert done.stdout.strip() == str(tree / "bin/uv")

    def test_it_takes_the_one_it_installed_before(self, tree: Path) -> None:
        write_executable(tree / "bin/uv", "#!/bin/sh\nexit 1\n")
        write_executable(tree / ".tools/uv/bin/uv", "#!/bin/sh\nexit 0\n")
        done = run(tree / "scripts/bootstrap", PATH=f"{tree / 'bin'}:{os.environ['PATH']}")
        assert done.stdout.strip() == str(tree / ".tools/uv/bin/uv")


class TestWholeRun:
    """`.ci/run` with a make and a package manager that only report."""

    def run(self, tree: Path, make: str) -> subprocess.CompletedProcess[str]:
        write_executable(tree / "scripts/ci/apt-install", "#!/bin/sh\necho installed: $*\n")
        targets = "for word; do case $word in -* | *=*) ;; *) target=$word ;; esac; done"
        write_executable(tree / "bin/make", f"#!/bin/sh\n{targets}\n{make}\n")
        return run("bash", tree / ".ci/run", cwd=tree, PATH=f"{tree / 'bin'}:{os.environ['PATH']}")

    def test_it_ends_with_the_closing_lines_of_the_runners(self, tree: Path) -> None:
        done = self.run(tree, 'echo noise; echo "==== 3 passed in 0.10s ===="; echo "$target went well"')
        assert done.returncode == 0
        heading, line = done.stdout.splitlines()[-2:]
        assert heading.startswith("== containers: passed in ")
        assert line == "==== 3 passed in 0.10s ===="

    @pytest.mark.parametrize("target", ["check", "test-all", "containers"])
    def test_one_failure_fails_it_and_the_rest_is_run(self, tree: Path, target: str) -> None:
        done = self.run(tree, f'echo "ran $target"; test "$target" != {target}')
        assert done.returncode == 1
        assert f"== {target.removesuffix('-all')}: FAILED with status 1" in done.stdout
        for each in ("check", "test-all", "containers"):
            assert f"ran {each}\n" in done.stdout

    def test_it_stops_the_engine_that_a_step_started(self, tree: Path) -> None:
        engine = '#!/bin/sh\nif [ "$1" = stop ]; then rm .tools/dockerd.pid; echo engine stopped; fi\n'
        write_executable(tree / "scripts/ci/docker-engine", engine)
        done = self.run(tree, 'if [ "$target" = containers ]; then echo 1 > .tools/dockerd.pid; fi')
        assert "engine stopped" in done.stdout

    def test_it_leaves_an_engine_that_ran_before(self, tree: Path) -> None:
        write_executable(tree / "scripts/ci/docker-engine", "#!/bin/sh\necho engine stopped\n")
        (tree / ".tools").mkdir()
        (tree / ".tools/dockerd.pid").write_text("1\n")
        assert "engine stopped" not in self.run(tree, "true").stdout


class TestSubjects:
    """`subjects` in a repository of its own."""

    def commit(self, tree: Path, subject: str, at: str = "2030-01-31T12:00:00Z") -> None:
        if not (tree / ".git").exists():
            run("git", "init", "--quiet", cwd=tree)
        author = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example", "GIT_AUTHOR_DATE": at}
        committer = {"GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@example"}
        done = run("git", "commit", "--quiet", "--allow-empty", "-m", subject, cwd=tree, **author, **committer)
        assert done.returncode == 0, done.stderr

    def test_a_subject_of_72_characters_passes_and_one_of_73_fails(self, tree: Path) -> None:
        self.commit(tree, "é" * 72)
        assert run(tree / "scripts/ci/subjects", cwd=tree).returncode == 0
        self.commit(tree, "x" * 73)
        self.commit(tree, "the newest is short")
        done = run(tree / "scripts/ci/subjects", cwd=tree)
        assert done.returncode == 1
        assert "73 characters, 72 are the most" in done.stderr

    def test_subjects_from_before_the_rule_pass(self, tree: Path) -> None:
        self.commit(tree, "x" * 200, at="2026-11-28T12:00:00Z")
        assert run(tree / "scripts/ci/subjects", cwd=tree).returncode == 0

    def test_where_there_is_no_history_there_is_nothing_to_fail(self, tree: Path) -> None:
        assert run(tree / "scripts/ci/subjects", cwd=tree).returncode == 0
        run("git", "init", "--quiet", cwd=tree)
        assert run(tree / "scripts/ci/subjects", cwd=tree).returncode == 0

    def test_the_last_commit_of_a_shallow_clone_is_looked_at(self, tree: Path, tmp_path: Path) -> None:
        self.commit(tree, "x" * 73)
        self.commit(tree, "a short one")
        clone = tmp_path / "clone"
        run("git", "clone", "--quiet", "--depth", "1", f"file://{tree}", clone)
        shutil.copytree(tree / "scripts", clone / "scripts")
        assert run(clone / "scripts/ci/subjects", cwd=clone).returncode == 0


class TestLines:
    """`lines.py` on a project of its own."""

    def check(self, folder: Path, lines: int, exceptions: str = "[]") -> subprocess.CompletedProcess[str]:
        (folder / "packages").mkdir()
        (folder / "packages/module.py").write_text("x = 1\n" * lines)
        (folder / "pyproject.toml").write_text(f"[tool.abstract-backend]\nlong-modules = {exceptions}\n")
        return run(sys.executable, ROOT / "scripts/ci/lines.py", folder)

    def test_a_module_of_400_lines_passes(self, tmp_path: Path) -> None:
        assert self.check(tmp_path, 400).returncode == 0

    def test_a_longer_module_fails(self, tmp_path: Path) -> None:
        done = self.check(tmp_path, 401)
        assert done.returncode == 1
        assert "packages/module.py: 401 lines, 400 are the most" in done.stderr

    def test_an_exception_lets_it_pass(self, tmp_path: Path) -> None:
        assert self.check(tmp_path, 401, '["packages/module.py"]').returncode == 0

    def test_an_exception_that_is_not_needed_is_told(self, tmp_path: Path) -> None:
        assert "needs its exception no more" in self.check(tmp_path, 400, '["packages/module.py"]').stdout
