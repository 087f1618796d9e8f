"""The plugin: what is chosen, what the verdict is, and what the exit status says."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runner import Runner

pytestmark = pytest.mark.thorough

ONE = "test_publish_returns_when_the_broker_holds_the_message"

MINIMAL = """
import asyncio, collections, os
from abe_contract_tests.harness import Harness

queues = collections.defaultdict(asyncio.Queue)

class Three:
    def __init__(self, queue):
        self.queue = queue
    @classmethod
    def from_env(cls):
        return cls(queues[os.environ["THREE"]])
    async def publish(self, key, payload):
        await self.queue.put(dict(payload))
    async def consume(self, *, group=None):
        while True:
            yield await self.queue.get()

class ThreeHarness(Harness):
    name = "three"
    backend = Three
    evidence = "in process"
    networked = False
    def environment(self, namespace, *, lease):
        return {"THREE": namespace}
    async def oracle(self, namespace):
        raise NotImplementedError
"""

AWAY = """
from abe.backends.message_queue.service._harness import MemoryHarness
from abe_contract_tests.services import ServiceUnavailable

class AwayHarness(MemoryHarness):
    name = "away"
    def start(self):
        raise ServiceUnavailable("install a broker")
"""


RED = """
import logging, pytest
from abe_contract_tests.services import redis_service

@pytest.fixture
def redis():
    with redis_service(environ={"ABE_TEST_SERVICES": "processes"}) as service:
        yield service

def test_red(redis):
    logging.getLogger("abe.consumer").warning("order %s", 17)
    redis.kill()
    raise AssertionError("as told")

def test_green(redis):
    pass
"""

LOOP = """
import asyncio

async def test_the_loop(tmp_path):
    (tmp_path.parent / "loop").write_text(type(asyncio.get_running_loop()).__module__)
"""


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_a_chosen_subset_is_incomplete_and_green_at_a_desk_only(run: Runner) -> None:
    at_a_desk = run("--contract=memory", "-k", ONE)
    assert at_a_desk.providers["memory"]["verdict"] == "INCOMPLETE"
    assert at_a_desk.status == 0
    assert "memory: INCOMPLETE" in at_a_desk.output
    assert at_a_desk.output.rstrip().splitlines()[-1].startswith("1 passed")
    assert at_a_desk.output.count("not run") == 2  # the one line, and the count
    listed = run("--contract=memory", "-k", ONE, "-vv").output
    assert "C-DUR-01" in at_a_desk.output
    assert "C-ENC-01" not in at_a_desk.output
    assert "C-ENC-01" in listed
    assert run("--contract=memory", "-k", ONE, CI="1").status == 1
    assert run("--contract=memory", "-k", ONE, "--contract-strict").status == 1


def test_a_run_begins_with_no_warning(run: Runner) -> None:
    done = run("--contract=memory", "-k", ONE, PYTHONWARNINGS="always::DeprecationWarning")
    assert done.status == 0
    assert "Warning" not in done.output + done.errors


def test_results_come_together_from_the_workers_of_xdist(run: Runner) -> None:
    done = run("--contract=memory", "-k", "C-PUB or test_publish", "-n", "2")
    assert done.status == 0, done.output
    assert done.clause("memory", "C-PUB-01")["status"] == "passed"
    assert done.providers["memory"]["broker"] == "memory"
    assert done.clause("memory", "C-PUB-03")["status"] == "refused, as undeclared"


def test_a_test_left_out_by_a_hook_is_never_green(run: Runner) -> None:
    run.write(
        "leaving_out.py",
        f"def pytest_collection_modifyitems(items):\n    items[:] = [i for i in items if {ONE!r} in i.name]\n",
    )
    done = run("--contract=memory", "-p", "leaving_out")
    assert (done.status, done.providers["memory"]["verdict"]) == (1, "INCOMPLETE")


def test_a_skipped_test_is_never_green(run: Runner) -> None:
    hook = "import pytest\ndef pytest_collection_modifyitems(items):\n    [i.add_marker(pytest.mark.skip('later')) for i in items]\n"
    run.write("leave_it.py", hook)
    done = run("--contract=memory", "-p", "leave_it", "-k", ONE)
    assert (done.status, done.providers["memory"]["verdict"]) == (1, "INCOMPLETE")
    assert (
        "later" in done.clause("memory", "C-PUB-01")["detail"]
        or "not collected" in done.clause("memory", "C-PUB-01")["detail"]
    )


def test_an_overridden_fixture_fails(run: Runner) -> None:
    fixture = "import pytest\n@pytest.fixture\ndef contract():\n    return None\n"
    run.write("overriding.py", fixture)
    done = run("--contract=memory", "-p", "overriding", "-k", ONE)
    assert done.status == 1
    assert "overridden" in done.output


def test_a_redefined_test_fails(run: Runner) -> None:
    module = f"from abe_contract_tests.marks import clause\n@clause('C-PUB-01')\nasync def {ONE}(contract):\n    pass\n"
    done = run("--contract=memory", target=run.write("test_publish.py", module))
    assert done.status == 1
    assert "redefined" in done.output


def test_a_replaced_function_fails(run: Runner) -> None:
    patch = (
        "from abe_contract_tests.suite import test_publish\n"
        f"marks = test_publish.{ONE}.pytestmark\n"
        f"async def {ONE}(contract):\n    pass\n"
        f"{ONE}.pytestmark = marks\n"
        f"test_publish.{ONE} = {ONE}\n"
    )
    run.write("replacing.py", patch)
    done = run("--contract=memory", "-p", "replacing", "-k", ONE)
    assert done.status == 1
    assert "redefined" in done.output


def test_a_waiver_covers_a_failure_until_it_expires(run: Runner) -> None:
    waiver = '[[waiver]]\nclause = "C-ENC-02"\nreason = "being fixed"\nexpires = {}\n'
    chosen = ("--contract=saboteurs:CoercesPayloadsHarness", "-k", "test_what_json_cannot_hold_is_refused")
    valid = run(*chosen, f"--contract-waivers={run.write('valid.toml', waiver.format('2999-12-31'))}")
    name = "saboteurs:CoercesPayloadsHarness"
    assert valid.clause(name, "C-ENC-02")["status"] == "waived"
    assert valid.status == 0, valid.output
    expired = run(*chosen, f"--contract-waivers={run.write('expired.toml', waiver.format('2020-01-01'))}")
    assert expired.status == 1
    assert "expired on 2020-01-01" in expired.output


def test_a_waiver_of_what_holds_fails(run: Runner) -> None:
    waiver = '[[waiver]]\nclause = "C-PUB-05"\nreason = "we were wrong"\nexpires = 2999-12-31\n'
    done = run("--contract=memory", "-k", "100_tasks_publish", f"--contract-waivers={run.write('w.toml', waiver)}")
    assert (done.status, done.providers["memory"]["verdict"]) == (1, "FAIL")
    assert "remove the waiver" in done.output


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[[waiver]]\nclause = "C-XXX-01"\nreason = "x"\nexpires = 2999-12-31\n', "not a clause"),
        ('[[waiver]]\nclause = "C-PUB-05"\nreason = " "\nexpires = 2999-12-31\n', "needs its reason"),
        ('[[waiver]]\nclause = "C-PUB-05"\nreason = "x"\nexpires = "soon"\n', "must be a date"),
        ('[[waiver]]\nclause = "C-PUB-05"\n', "missing"),
    ],
)
def test_a_malformed_waiver_is_refused(run: Runner, text: str, complaint: str) -> None:
    done = run("--contract=memory", f"--contract-waivers={run.write('w.toml', text)}")
    assert done.status == pytest.ExitCode.USAGE_ERROR
    assert complaint in done.errors


def test_a_missing_broker_is_skipped_at_a_desk_and_fails_in_ci(run: Runner) -> None:
    run.write("away.py", AWAY)
    at_a_desk = run("--contract=away:AwayHarness", "-k", "test_publish")
    assert at_a_desk.status == 0, at_a_desk.output
    assert at_a_desk.providers["away:AwayHarness"]["verdict"] == "INCOMPLETE"
    assert "install a broker" in at_a_desk.output
    in_ci = run("--contract=away:AwayHarness", "-k", "test_publish", CI="true")
    assert in_ci.status == 1
    assert "install a broker" in in_ci.output


def test_a_provider_with_three_methods_proves_what_it_offers(run: Runner) -> None:
    run.write("three.py", MINIMAL)
    done = run("--contract=three:ThreeHarness")
    assert done.status == 0, done.output
    assert done.providers["three:ThreeHarness"]["verdict"] == "PASS"
    assert done.clause("three:ThreeHarness", "C-DLV-01")["status"] == "passed"
    assert done.clause("three:ThreeHarness", "C-PSN-03")["status"].startswith("not offered")


def test_an_unknown_harness_is_a_usage_error_that_names_the_known_ones(run: Runner) -> None:
    done = run("--contract=kafka")
    assert done.status == pytest.ExitCode.USAGE_ERROR
    assert "'memory'" in done.errors


def test_without_a_harness_the_suite_says_how_to_choose_one(run: Runner) -> None:
    done = run()
    assert done.status != 0
    assert "--contract NAME" in done.output


def test_the_plugin_is_silent_where_no_clause_is_tested(run: Runner) -> None:
    done = run(target=run.write("test_mine.py", "def test_mine():\n    pass\n"))
    assert done.status == 0
    assert "contract" not in done.output


def test_what_is_known_of_a_failing_test_is_shown_and_kept(run: Runner) -> None:
    done = run(f"--contract-keep={run.folder / 'kept'}", "-n", "1", target=run.write("test_mine.py", RED))
    assert done.status == 1
    assert "abe.consumer WARNING order 17" in done.output
    assert "it is killed" in done.output
    assert "eady to accept connections" in done.output
    (kept,) = (run.folder / "kept").iterdir()
    (red,) = (path for path in kept.iterdir() if path.is_dir())
    names = [path.name.partition("_of_")[0] for path in sorted(red.iterdir())]
    assert (red.name, names) == ("test_mine.py_test_red", ["call.txt", "log", "timeline.txt"])
    assert "as told" in (red / "call.txt").read_text()
    lines = [json.loads(line) for line in (kept / "timeline-gw0.jsonl").read_text().splitlines()]
    assert [line["test"].rpartition("::")[2] for line in lines] == ["test_red", "test_green"]


def test_the_tests_run_on_the_event_loop_that_is_asked_for(run: Runner) -> None:
    module = run.write("test_mine.py", LOOP)
    for chosen in (["--contract-loop=uvloop"], []):
        done = run("-o", "asyncio_mode=auto", "-n", "1", f"--basetemp={run.folder / 'base'}", *chosen, target=module)
        assert done.status == 0, done.output
        (seen,) = (run.folder / "base").rglob("loop")
        assert seen.read_text().startswith("uvloop") is bool(chosen)


def test_an_event_loop_that_is_none_is_refused(run: Runner) -> None:
    done = run(target=run.write("test_mine.py", LOOP), ABE_CONTRACT_LOOP="gevent")
    assert done.status == pytest.ExitCode.USAGE_ERROR
    assert "must be asyncio or uvloop" in done.errors
