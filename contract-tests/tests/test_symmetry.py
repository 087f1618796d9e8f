"""The providers are siblings: who knows one finds his way in each."""

import difflib
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "packages"
TEMPLATE = "redis"
PROVIDERS = sorted(
    path.parent.name.removeprefix("abe-backend-") for path in PACKAGES.glob("abe-backend-*/pyproject.toml")
)
MODULES = {
    "__init__",
    "_backend",
    "_connection",
    "_errors",
    "_harness",
    "_receiver",
    "_settings",
    "_topology",
    "_transport",
    "_wire",
}
TESTS = {"test_settings", "test_wire", "test_topology", "test_errors", "test_transport"}
HEADINGS = ["Install", "Thirty seconds", "Settings", "Guarantees", "Topology", "Wire format", "Differences"]

EXTRA: dict[str, dict[str, str]] = {
    "rabbitmq": {
        "_broker": "transport and receivers share connections, groups, the publisher and the delays",
        "_browser": "AMQP has no way to look into a queue but to take its messages and give them back",
        "_channel": "publishing, deliveries and settlements are frames of ours, past the client",
        "_consuming": "the broker counts the time that a message is buffered, and a consumer's prefetch is fixed",
        "_control": "requests that are rare have a connection of their own, as the broker stops reading from those that publish",
        "_dead_letters": "dead letters are looked through by taking them and giving them back, page by page",
        "_delays": "a delay is a walk through queues",
        "_fan_out": "a queue's refusal does not say whose it is: each group is asked for itself",
        "_groups": "exchanges, queues and bindings are made and changed one by one",
        "_losses": "the broker counts lost connections as deliveries",
        "_movers": "a delay that ends is moved on by whoever consumes, as the broker's own way may wait for minutes",
        "_pace": "the broker takes a message from a consumer that holds it for long, buffered or not",
        "_parked": "what was published before there was a group is moved message by message",
        "_properties": "AMQP's table of headers, with its types kept",
        "_publisher": "the connection that publishes, apart from the one that consumes",
        "_quiet": "the client's loggers show URLs and tracebacks",
        "_registry": "AMQP lists neither queues nor bindings: the groups are kept in a message, under a lock",
        "_settlements": "most settlements are a copy, its confirm and an acknowledgement",
        "_tap": "frames that are many go past the client",
        "_tried": "the broker counts deliveries that no client saw: what a handler has begun on alone is recorded",
        "_tls": "certificates and keys are files, read anew for each connection",
        "_watch": "a connection that went silent is asked, and given up",
        "conftest": "a node to share, and private ones to hurt",
        "rabbitmq_access": "what an application does, and how it is refused, which several files try",
        "test_attempts": "attempts that the broker counts and no handler has begun",
        "test_channel": "what a channel promises, on a real node",
        "test_connection": "several connections, the requests on them, and several addresses",
        "test_dead_letters": "dead letters in pages, beside consumers and other lookers",
        "faults": "what is left of a message when this broker's connections, queues and nodes break, on a node of its own",
        "test_interop": "messages of plain clients, and ours read by them",
        "test_receiver": "what counts as an attempt where the broker counts more",
        "test_receiving": "how consuming and publishing begin and end",
        "test_rights": "users, what they may do, and what is already there",
        "test_silence": "links that go silent without a word",
        "test_tap": "frames in pieces, torn, out of order, and a broker that is silent",
        "test_tls": "certificates and keys, the broker's and ours",
    },
    "redis": {
        "_broker": "transport and receivers share the server's connections and scripts",
        "_dead_letters": "a script must not look at more than a part of them at a time",
        "_login": "the transport is ours, and so is the login: what is wrong is said by the variable's name",
        "_options": "one URL says where, as whom, and with which TLS",
        "_protocol": "the client's own reading and writing would be most of what a message costs",
        "_registry": "a publisher knows the groups without asking, and is told when they have changed",
        "_scripts": "what must happen in one step happens in the server, by scripts in Lua",
        "conftest": "servers to share, and private ones to hurt",
        "redis_primitives": "settlements, and looks at a server, that the tests share",
        "test_connection": "getting in: TLS, users and rights, and what the server has to be",
        "test_dead_letters": "pages, bounded in number and in bytes, beside consumers",
        "test_faults": "what is left of a message when this broker's connections and servers break",
        "test_handshake": "what is sent to log in, and what a server may refuse of it",
        "test_leases": "each consumer's lease is its own setting, whatever the others have",
        "test_login": "what is wrong with an address or a user is said by the variable's name",
        "test_parked": "messages from before their group join it in steps, while others publish",
        "test_poison": "whatever is found under our names stops nobody but itself",
        "test_receiver": "settling, leases and recovery, on each make of server",
        "test_refusals": "rights are given command by command: newer ones are done without",
        "test_scripts": "scripts that a server forgot, and that a cluster has to allow",
        "test_silence": "links that go silent without a word",
    },
    "sqs": {
        "_answers": "an intermediary may answer in the service's place: what an answer must have is checked",
        "_attributes": "queues can be made by anybody, with anything",
        "_broker": "transport and receivers share the clients, the groups, and what goes on in the background",
        "_browser": "dead letters and parked messages are in queues, which can be looked through only by receiving",
        "_copies": "where a broker can neither uncount a delivery nor move a message, a copy takes its place",
        "_delays": "a FIFO queue can delay no single message",
        "_groups": "a group is several queues, made and changed one by one",
        "_inflight": "every receipt has a lease of its own, and some deliveries were no attempts",
        "_parked": "what was published before there was a group is moved message by message",
        "_publisher": "the publisher copies a message to the groups' queues",
        "_queue": "requests are batches of messages, or of receipt handles, of which each may fail on its own",
        "_registry": "the groups are the tags of queues, which have no lock, and of which a few a second can be read",
        "_revival": "a lease that ran out while nobody else had the message is got back by receiving it",
        "_settlements": "a settlement is a deletion, another visibility, or a copy and a deletion",
        "_tags": "what the tags say",
        "_topics": "or SNS copies it",
        "conftest": "a server to share, behind a gate that can be made to fail",
        "test_answers": "answers that are not of their form",
        "test_attributes": "queues that are there already: used as they are, put right, or refused",
        "test_connection": "the clients of the AWS SDK, and how they end",
        "test_dead_letters": "dead letters in numbers, each moved once",
        "test_delays": "delays and leases longer than this broker knows",
        "test_faults": "what this broker does and no emulator of it can be made to do",
        "test_fifo": "the other kind of queue that this broker has",
        "test_groups": "groups are queues, which other processes and other people change underneath",
        "test_parked": "what was published before there was a group is found whatever SQS counts, and moved",
        "test_publisher": "a message goes to several queues, some of which may have it",
        "test_receiver": "each receipt is settled by requests of its own, which may fail one by one",
        "test_redelivery": "what SQS delivers again to the consumer that had it, and that the engine has no more, or never had",
        "test_registry": "what publishers know of groups, while others change them and SQS answers little",
        "test_revival": "leases that ran out, while nobody else had the message and while somebody had",
        "test_rights": "rights are the account's policies, which the documentation lists",
        "test_silence": "links that go silent without a word",
        "test_topics": "the other way to the groups' queues",
    },
}
"""What a provider has beside what all have, and why."""

OWN_LINES = 7
"""Lines of a pyproject.toml that are a provider's own: name, description, keywords, dependencies (its own and its tests'), entry point,
package. It has a harness for each of the servers that it is tested on."""


RETIRED = {
    "drawer": "browser",
    "flights": "max_concurrent",
    "hidden": "invisible",
    "hide": "change visibility",
    "hides": "invisible, in flight",
    "ignorance": "propagation_delay",
    "insist": "raise_if_retryable",
    "landed": "a batch is done",
    "not_ours": "lease_lost",
    "outlet": "publisher",
    "patience": "timeout",
    "stranger": "foreign message, third-party provider",
    "strangers": "foreign messages",
    "told": "text, template",
    "verb": "disposition, method",
    "verbs": "dispositions, methods",
    "verdict": "settlement, result",
    "verdicts": "settlements, results",
}
"""Words that names had once, and the field's terms for them: see the glossary in docs/ARCHITECTURE.md."""

SOURCES = {
    "packages/abe-core": set[str](),
    **{f"packages/abe-backend-{provider}": set[str]() for provider in PROVIDERS},
    "contract-tests": {"verdict", "verdicts"},  # the overall result of a provider
}
"""The distributions that the test checks, each with the words that it uses in their own sense."""


def names(directory: Path) -> set[str]:
    found = {path.stem for path in directory.glob("*.py")} | {
        path.parent.name for pattern in ("*/__init__.py", "*/test_*.py") for path in directory.glob(pattern)
    }
    return found - {"__pycache__"}


def extra(provider: str, *, tests: bool) -> set[str]:
    return {name for name in EXTRA.get(provider, {}) if name.startswith("_") is not tests}


def pyproject(provider: str) -> list[str]:
    """Return the lines of a provider's pyproject.toml without its harnesses."""
    text = (PACKAGES / f"abe-backend-{provider}/pyproject.toml").read_text()
    return re.sub(r'(harnesses"\]\n)(.+\n)+', r"\1", text).splitlines()


def shown(default: object) -> str:
    """Return how a README shows a default."""
    if default is None or default is MISSING:  # what is made by a factory is empty
        return "unset"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_template_is_one_of_them() -> None:
    assert TEMPLATE in PROVIDERS
    assert set(EXTRA) <= set(PROVIDERS)


def test_the_modules_are_the_same(provider: str) -> None:
    source = PACKAGES / f"abe-backend-{provider}/src/abe_backend_{provider}"
    assert names(source) == MODULES | extra(provider, tests=False)
    assert (source / "py.typed").is_file()


def test_the_tests_are_the_same(provider: str) -> None:
    assert names(PACKAGES / f"abe-backend-{provider}/tests") == TESTS | extra(provider, tests=True)


def test_it_exports_a_backend_and_its_settings(provider: str) -> None:
    package = import_module(f"abe_backend_{provider}")
    backend, settings = package.__all__
    name = backend.removesuffix("Backend")
    assert name.lower() == provider
    assert (backend, settings) == (f"{name}Backend", f"{name}Settings")


def test_the_backend_s_public_members_come_in_the_same_order(provider: str) -> None:
    package = import_module(f"abe_backend_{provider}")
    backend = getattr(package, package.__all__[0])
    assert [name for name in vars(backend) if not name.startswith("_")] == [
        "settings_type",
        "capabilities",
        "make_transport",
    ]
    assert list(backend.__annotations__) == ["settings_type", "capabilities"]


def test_the_readme_has_the_same_headings(provider: str) -> None:
    text = (PACKAGES / f"abe-backend-{provider}/README.md").read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS


def test_the_readme_lists_the_settings_of_the_class(provider: str) -> None:
    package = import_module(f"abe_backend_{provider}")
    text = (PACKAGES / f"abe-backend-{provider}/README.md").read_text()
    section = text.partition("## Settings")[2].partition("\n## ")[0]
    documented = [
        tuple(cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    assert documented == [
        (item.metadata["variable"], item.name, shown(item.default), item.metadata["help"].replace("|", "\\|"))
        for item in fields(getattr(package, package.__all__[1]))
    ]


def test_the_pyproject_is_the_template_but_for_what_is_its_own(provider: str) -> None:
    template, text = map(pyproject, (TEMPLATE, provider))
    different = [line for line in difflib.ndiff(template, text) if line.startswith("+ ")]
    assert len(different) <= OWN_LINES, "\n".join(different)
    assert len(text) == len(template)


@pytest.mark.parametrize("source", SOURCES)
def test_names_use_the_terms_of_the_field(source: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}: say {RETIRED[word]}"
        for path in sorted((ROOT / source / "src").rglob("*.py"))
        for line, name in identifiers(path)
        for word in retired(name) - SOURCES[source]
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("_hide_for", "hide"),
        ("QueueDrawer", "drawer"),
        ("HIDDEN", "hidden"),
        ("not_ours", "not_ours"),
        ("hideous", None),
    ],
)
def test_a_retired_word_is_found_in_any_kind_of_name(name: str, word: str | None) -> None:
    assert retired(name) == ({word} if word else set())


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def retired(name: str) -> set[str]:
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    pairs = {f"{first}_{second}" for first, second in pairwise(words)}
    return (set(words) | pairs) & RETIRED.keys()
