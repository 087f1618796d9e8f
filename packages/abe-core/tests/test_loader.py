"""Which backend an application gets, and what it is told when it gets none."""

import asyncio
import logging
import sys
import types
import warnings
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any, Self

import pytest

import abe.backends
from abe.backends import get_message_queue_backend
from abe.backends.message_queue import loader
from abe.backends.message_queue.base import Middleware
from abe.backends.message_queue.loader import installed_backends, load_backend
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.codec import JSONCodec
from abe.errors import AbeError, BackendNotFoundError, ConfigurationError, PayloadError
from abe.testing import RecordingBackend
from abe.testing.plugin import RegisterBackend


class Stranger:
    """A provider with the three methods and nothing else."""

    async def publish(self, key: str, payload: dict[str, Any]) -> None:
        """Take no responsibility."""

    async def consume(self, *, group: str | None = None) -> AsyncIterator[dict[str, Any]]:
        for message in ():
            yield message

    @classmethod
    def from_env(cls) -> Self:
        return cls()


class Other(Stranger):
    """Another one."""


class Misconfigured(Stranger):
    """Its settings are wrong."""

    @classmethod
    def from_env(cls) -> Self:
        raise KeyError("STRANGER_URL")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUEUE_BACKEND", "MESSAGE_QUEUE_BACKEND", "ABSTRACT_BACKEND_DEBUG", "MESSAGE_QUEUE_BACKEND_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def debug_levels() -> Iterator[None]:
    """Put the loggers' levels back that the debug switches change."""
    before = {name: logging.getLogger(name).level for name in ("abe", "abe.loader", "abe.stranger", __name__)}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("abe"):
            logging.getLogger(name).setLevel(logging.NOTSET)


class Installed:
    """Stands for the entry points of an environment, in whichever group they are."""

    def __init__(self) -> None:
        self.points: list[EntryPoint] = []

    def add(self, name: str, value: str, group: str = loader.ENTRY_POINT_GROUP) -> None:
        self.points.append(EntryPoint(name, value, group))

    def __call__(self, *, group: str) -> EntryPoints:
        return EntryPoints(point for point in self.points if point.group == group)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """An environment with core alone, to which a test adds."""
    found = Installed()
    found.add("memory", "abe.backends.message_queue.service.memory:MemoryBackend")
    monkeypatch.setattr(loader, "entry_points", found)
    return found


HERE = "stranger_provider"


@pytest.fixture(autouse=True)
def stranger_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(HERE)
    for provider in (Stranger, Other, Misconfigured):
        setattr(module, provider.__name__, provider)
    monkeypatch.setitem(sys.modules, HERE, module)


def test_the_memory_backend_is_found_in_the_installed_metadata() -> None:
    assert entry_points(group="abe.backends.message_queue")["memory"].load() is MemoryBackend
    assert type(load_backend("memory")) is MemoryBackend


def test_every_installed_provider_of_the_project_is_found_under_its_name() -> None:
    found = installed_backends()
    assert list(found) == sorted(found)
    assert {"memory", "redis"} <= found.keys()
    assert all(callable(point.load().from_env) for point in found.values())


def test_a_registered_backend_is_loaded_by_name(register_backend: RegisterBackend) -> None:
    register_backend("stranger", Stranger)
    assert isinstance(load_backend("stranger"), Stranger)


def test_each_call_makes_a_new_backend(register_backend: RegisterBackend) -> None:
    register_backend("stranger", Stranger)
    assert load_backend("stranger") is not load_backend("stranger")


@pytest.mark.parametrize("variable", ["QUEUE_BACKEND", "MESSAGE_QUEUE_BACKEND"])
def test_the_environment_names_the_backend(
    variable: str, register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend("stranger", Stranger)
    monkeypatch.setenv(variable, "stranger")
    assert isinstance(load_backend(), Stranger)


def test_the_argument_comes_before_the_environment(
    register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend("stranger", Stranger)
    register_backend("other", Other)
    monkeypatch.setenv("QUEUE_BACKEND", "stranger")
    assert isinstance(load_backend("other"), Other)


def test_two_variables_that_name_different_backends_are_an_error_that_names_both(
    register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend("stranger", Stranger)
    register_backend("other", Other)
    monkeypatch.setenv("QUEUE_BACKEND", "stranger")
    monkeypatch.setenv("MESSAGE_QUEUE_BACKEND", "other")
    with pytest.raises(ConfigurationError, match="QUEUE_BACKEND='stranger' and MESSAGE_QUEUE_BACKEND='other'"):
        load_backend()
    assert isinstance(load_backend("other"), Other), "whoever names it himself is not concerned"


@pytest.mark.parametrize("alias", ["stranger", "Stranger", " stranger ", ""])
def test_two_variables_that_name_one_backend_are_none(
    alias: str, register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend("stranger", Stranger)
    monkeypatch.setenv("QUEUE_BACKEND", "stranger")
    monkeypatch.setenv("MESSAGE_QUEUE_BACKEND", alias)
    assert isinstance(load_backend(), Stranger)


@pytest.mark.parametrize("name", [" Redis", "redis\n", "REDIS", "\tredis "])
def test_case_and_spaces_around_a_name_do_not_matter(
    name: str, installed: "Installed", monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.add("redis", f"{HERE}:Stranger")
    monkeypatch.setenv("QUEUE_BACKEND", name)
    assert isinstance(load_backend(), Stranger)
    assert isinstance(load_backend(name), Stranger)


def test_a_provider_registered_with_capitals_is_found_too(installed: "Installed") -> None:
    installed.add("Stranger", f"{HERE}:Stranger")
    assert isinstance(load_backend("stranger"), Stranger)


def test_a_backend_in_place_of_its_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="takes a provider's name, not a type"):
        load_backend(Stranger)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", " "])
def test_a_variable_that_is_empty_is_not_set(text: str, installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.add("stranger", f"{HERE}:Stranger")
    monkeypatch.setenv("QUEUE_BACKEND", text)
    assert isinstance(load_backend(), Stranger)


def test_the_one_installed_provider_is_taken_when_none_is_named_and_that_is_logged(
    installed: Installed, caplog: pytest.LogCaptureFixture
) -> None:
    installed.add("stranger", f"{HERE}:Stranger")
    with caplog.at_level(logging.INFO, "abe.loader"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(load_backend(), Stranger)
    assert "'stranger'" in caplog.text


def test_of_several_providers_the_first_by_name_is_taken_with_a_warning_that_names_them(installed: Installed) -> None:
    installed.add("zebra", f"{HERE}:Other")
    installed.add("aardvark", f"{HERE}:Stranger")
    with pytest.warns(UserWarning, match=r"aardvark, zebra.*'aardvark'.*QUEUE_BACKEND") as caught:
        assert isinstance(load_backend(), Stranger)
    assert caught[0].filename == __file__, "the warning points at the caller"


def test_with_core_alone_memory_is_taken_with_a_warning_that_says_what_to_do(installed: Installed) -> None:
    with pytest.warns(UserWarning, match=r"pip install abe-backend-redis.*QUEUE_BACKEND=memory") as caught:
        assert type(load_backend()) is MemoryBackend
    assert caught[0].filename == __file__, "the warning points at the caller"


def test_memory_by_name_warns_of_nothing(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_BACKEND", "memory")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(load_backend()) is MemoryBackend


@pytest.mark.parametrize("through", ["argument", "environment"])
def test_a_name_that_is_not_installed_raises_and_nothing_else_is_taken(
    through: str, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.add("redis", f"{HERE}:Stranger")
    monkeypatch.setenv("QUEUE_BACKEND", "rediss")
    with pytest.raises(BackendNotFoundError) as caught:
        load_backend("rediss" if through == "argument" else None)
    text = str(caught.value)
    assert "'rediss'" in text
    assert "Did you mean 'redis'?" in text
    assert "Installed: memory, redis." in text
    assert "asked for by load_backend()" in text if through == "argument" else "asked for by QUEUE_BACKEND" in text
    # The line is for the name that was meant: one for the typing error might install a stranger's package.
    assert "pip install abe-backend-redis " in text
    assert "uv add abe-backend-redis)" in text


def test_a_name_close_to_nothing_is_not_guessed_at(installed: Installed) -> None:
    with pytest.raises(BackendNotFoundError) as caught:
        load_backend("kafka")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["kafka", "nats", "abe-backend-kafka", "-r/tmp/x"])
def test_nothing_is_said_about_installing_what_we_do_not_publish(name: str, installed: Installed) -> None:
    installed.add("nats-jetstream", f"{HERE}:Stranger")
    with pytest.raises(BackendNotFoundError) as caught:
        load_backend(name)
    text = str(caught.value)
    assert "pip" not in text
    assert f"abe-backend-{name}" not in text
    assert "entry-point group 'abe.backends.message_queue'" in text


@pytest.mark.parametrize("variable", ["QUEUE_BACKEND", "MESSAGE_QUEUE_BACKEND"])
def test_an_address_in_place_of_a_name_is_not_shown_and_it_is_said_where_it_belongs(
    variable: str, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "redis://user:hunter2@host:6379/0")
    with pytest.raises(BackendNotFoundError, match=r"REDIS_URL\. Did you mean 'redis'\?") as caught:
        load_backend()
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("QUEUE_BACKEND", "memory")
    monkeypatch.setenv("MESSAGE_QUEUE_BACKEND", "redis://user:hunter2@host:6379/0")
    with pytest.raises(ConfigurationError, match="both set, and they differ") as differ:
        load_backend()
    assert "hunter2" not in str(differ.value)


def test_a_name_in_quotation_marks_is_shown_with_them(installed: Installed) -> None:
    with pytest.raises(BackendNotFoundError, match=r"provider '\"redis\"' .*Did you mean 'redis'"):
        load_backend('"redis"')


@pytest.mark.parametrize(("name", "meant"), [("Rabbit-MQ", "rabbitmq"), ("rabbit", "rabbitmq"), ("SQS", "sqs")])
def test_what_we_do_publish_is_said_with_the_line_that_installs_it(name: str, meant: str, installed: Installed) -> None:
    with pytest.raises(BackendNotFoundError, match=f"pip install abe-backend-{meant}  "):
        load_backend(name)


class Distribution:
    """Stands for the distribution that an entry point is from."""

    def __init__(self, name: str) -> None:
        self.name = name


def of(distribution: str, point: EntryPoint) -> None:
    vars(point)["dist"] = Distribution(distribution)


@pytest.mark.parametrize("group", [loader.ENTRY_POINT_GROUP, loader.OLDER_ENTRY_POINT_GROUP])
def test_one_name_of_two_distributions_raises_and_names_both_when_it_is_to_be_loaded(
    group: str, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.add("twice", f"{HERE}:Stranger")
    installed.add("twice", f"{HERE}:Other", group)
    installed.add("other", f"{HERE}:Other")
    for point, distribution in zip(installed.points[1:], ["abe-twice", "fork-of-abe-twice", "abe-other"], strict=True):
        of(distribution, point)
    for wanted in ("twice", "TWICE"):
        with pytest.raises(ConfigurationError, match=r"abe-twice and fork-of-abe-twice.*'twice'.*pip uninstall"):
            load_backend(wanted)
    assert isinstance(load_backend("other"), Other), "the others are not concerned"
    monkeypatch.setenv("QUEUE_BACKEND", "twice")
    with pytest.raises(ConfigurationError, match="abe-twice and fork-of-abe-twice"):
        load_backend()


def test_two_installed_distributions_are_told_apart_by_their_real_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, register_backend: RegisterBackend
) -> None:
    for distribution in ("abe_redis_fork", "another_fork"):
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{loader.ENTRY_POINT_GROUP}]\nmemory = {HERE}:Stranger\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match="abe-core and abe_redis_fork and another_fork"):
        load_backend("memory")
    assert "memory" in installed_backends()
    register_backend("memory", Other)
    assert isinstance(load_backend("memory"), Other)


def test_one_name_of_one_distribution_in_both_groups_is_one_provider(installed: Installed) -> None:
    installed.add("twice", f"{HERE}:Stranger")
    installed.add("twice", f"{HERE}:Other", loader.OLDER_ENTRY_POINT_GROUP)
    for point in installed.points[1:]:
        of("abe-twice", point)
    assert isinstance(load_backend("twice"), Stranger)


def test_a_tests_backend_shadows_even_two_distributions(
    installed: Installed, register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for distribution in ("abe-twice", "fork-of-abe-twice"):
        installed.add("twice", f"{HERE}:Stranger")
        of(distribution, installed.points[-1])
    register_backend("twice", Other)
    real = entry_points(group=loader.ENTRY_POINT_GROUP)["twice"]
    # Found among the installed ones, wherever it stands.
    for points in ([real, *installed.points], [*installed.points, real]):
        monkeypatch.setattr(installed, "points", points)
        assert isinstance(load_backend("twice"), Other)


class Told(Stranger):
    """A provider whose from_env takes what load_backend can give."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    @classmethod
    def from_env(cls, **given: Any) -> Self:
        return cls(**given)


def test_a_provider_is_told_what_the_caller_gives_and_nothing_else(register_backend: RegisterBackend) -> None:
    register_backend("told", Told)
    codec, middleware, environ = JSONCodec(), [Middleware()], {"QUEUE_BACKEND": "told"}
    for given in ({}, {"codec": codec}, {"middleware": middleware, "codec": codec, "environ": environ}):
        backend = load_backend("told", **given)  # type: ignore[arg-type]
        assert isinstance(backend, Told)
        assert backend.given == given


def test_another_environment_names_the_backend_and_configures_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_BACKEND", "no-such-provider")
    monkeypatch.setenv("QUEUE_NAMESPACE", "not this one")
    backend = load_backend(environ={"QUEUE_BACKEND": "memory", "QUEUE_NAMESPACE": "this-one"})
    assert isinstance(backend, MemoryBackend)
    assert backend.settings.namespace == "this-one"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"codec": JSONCodec()}, "does not take codec: Stranger.from_env"),
        ({"middleware": [Middleware()], "environ": {}}, "does not take middleware or environ: Stranger.from_env"),
    ],
)
def test_a_provider_with_the_three_methods_is_told_nothing_and_that_is_said(
    given: dict[str, Any], text: str, register_backend: RegisterBackend
) -> None:
    register_backend("stranger", Stranger)
    with pytest.raises(ConfigurationError, match=text):
        load_backend("stranger", **given)
    assert isinstance(load_backend("stranger", middleware=[], codec=None, environ=None), Stranger)


def test_an_environment_with_nothing_installed_says_so(installed: Installed) -> None:
    installed.points.clear()
    with pytest.raises(BackendNotFoundError, match="Installed: none"):
        load_backend("redis")


def test_not_found_is_of_our_tree_and_a_runtime_error(installed: Installed) -> None:
    with pytest.raises(AbeError) as caught:
        load_backend("kafka")
    assert isinstance(caught.value, RuntimeError)
    assert not caught.value.retryable


def test_the_older_group_is_read(installed: Installed) -> None:
    installed.add("elder", f"{HERE}:Stranger", loader.OLDER_ENTRY_POINT_GROUP)
    assert isinstance(load_backend("elder"), Stranger)
    assert loader.OLDER_ENTRY_POINT_GROUP == "abe.backends.message_queue.service"


def test_of_one_name_in_both_groups_the_newer_group_is_taken(installed: Installed) -> None:
    installed.add("twice", f"{HERE}:Stranger")
    installed.add("twice", f"{HERE}:Other", loader.OLDER_ENTRY_POINT_GROUP)
    assert isinstance(load_backend("twice"), Stranger)


def test_a_provider_that_cannot_be_imported_is_reported_with_its_cause(installed: Installed) -> None:
    installed.add("broken", "no_such_package_anywhere:Backend")
    with pytest.raises(
        BackendNotFoundError, match=r"'broken' \(no_such_package_anywhere:Backend\).*No module named"
    ) as caught:
        load_backend("broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("error", [RuntimeError("boom"), SyntaxError("boom"), AttributeError("boom")])
def test_whatever_a_providers_import_raises_is_the_cause(
    error: Exception, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: EntryPoint) -> None:
        raise error

    installed.add("broken", "a.module:Backend")
    monkeypatch.setattr(EntryPoint, "load", load)
    with pytest.raises(BackendNotFoundError, match=f"{type(error).__name__}: boom") as caught:
        load_backend("broken")
    assert caught.value.__cause__ is error


def test_a_provider_that_cannot_be_imported_does_not_hide_the_others(installed: Installed) -> None:
    installed.add("broken", "no_such_package_anywhere:Backend")
    installed.add("stranger", f"{HERE}:Stranger")
    assert list(installed_backends()) == ["broken", "memory", "stranger"]
    assert isinstance(load_backend("stranger"), Stranger)


def test_a_provider_without_the_three_methods_is_refused_and_what_it_lacks_is_named(installed: Installed) -> None:
    module = sys.modules[HERE]
    module.Half = type("Half", (), {"publish": lambda: None})  # type: ignore[attr-defined]
    installed.add("half", f"{HERE}:Half")
    with pytest.raises(BackendNotFoundError, match="has no consume, from_env"):
        load_backend("half")


def test_what_from_env_raises_passes_through_unwrapped(register_backend: RegisterBackend) -> None:
    register_backend("misconfigured", Misconfigured)
    with pytest.raises(KeyError, match="STRANGER_URL") as caught:
        load_backend("misconfigured")
    assert caught.value.__cause__ is None
    assert type(caught.value) is KeyError


def test_a_wrong_setting_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_PREFETCH", "many")
    with pytest.raises(ConfigurationError, match="QUEUE_PREFETCH"):
        load_backend("memory")


@pytest.mark.usefixtures("debug_levels")
def test_the_cores_debug_switch_takes_effect_before_the_loader_says_what_it_loads(
    register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register_backend("stranger", Stranger)
    monkeypatch.setenv("ABSTRACT_BACKEND_DEBUG", "true")
    load_backend("stranger")
    assert logging.getLogger("abe.consumer").isEnabledFor(logging.DEBUG)
    assert "backend 'stranger' (by load_backend()) is" in caplog.text


@pytest.mark.usefixtures("debug_levels")
def test_the_providers_debug_switch_reaches_the_one_that_is_loaded(
    register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend("stranger", Stranger)
    monkeypatch.setenv("MESSAGE_QUEUE_BACKEND_DEBUG", "true")
    load_backend("stranger")
    assert logging.getLogger("abe.stranger").isEnabledFor(logging.DEBUG)
    assert not logging.getLogger("abe.consumer").isEnabledFor(logging.DEBUG)


@pytest.mark.usefixtures("debug_levels")
def test_without_a_debug_switch_no_level_is_touched(register_backend: RegisterBackend) -> None:
    register_backend("stranger", Stranger)
    load_backend("stranger")
    assert logging.getLogger("abe").level == logging.NOTSET


def test_a_debug_switch_that_is_no_yes_or_no_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABSTRACT_BACKEND_DEBUG", "perhaps")
    with pytest.raises(ConfigurationError, match="ABSTRACT_BACKEND_DEBUG"):
        load_backend("memory")


async def test_the_shared_backend_is_one_in_an_event_loop(
    register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend("stranger", Stranger)
    monkeypatch.setenv("QUEUE_BACKEND", "stranger")
    assert get_message_queue_backend() is get_message_queue_backend()


def test_each_event_loop_has_a_shared_backend_of_its_own(
    register_backend: RegisterBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend("stranger", Stranger)
    monkeypatch.setenv("QUEUE_BACKEND", "stranger")

    async def shared() -> object:
        return get_message_queue_backend()

    assert asyncio.run(shared()) is not asyncio.run(shared())


def test_the_shared_backend_needs_a_running_event_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        get_message_queue_backend()


def test_the_shared_backend_of_a_closed_event_loop_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE_BACKEND", "memory")

    async def use() -> None:
        await get_message_queue_backend().publish("order.created", {"n": 1})

    for _ in range(3):
        asyncio.run(use())
    assert sum(loop.is_closed() for loop in abe.backends._shared) <= 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"codec": JSONCodec}, r"codec must be an instance: write JSONCodec\(\), not JSONCodec"),
        ({"codec": "json"}, r"codec must have encode\(\) and decode\(\), as JSONCodec\(\) has, and a str has not"),
        ({"middleware": Middleware()}, r"write \[Middleware\(...\)\], with brackets"),
        ({"middleware": [Middleware]}, r"write Middleware\(\), not Middleware"),
    ],
)
@pytest.mark.parametrize("name", ["memory", "recorded", "recording"])
def test_what_is_no_codec_and_no_middleware_is_refused_where_the_backend_is_made(
    name: str, given: dict[str, Any], text: str, register_backend: RegisterBackend
) -> None:
    register_backend("recorded", RecordingBackend())
    register_backend("recording", RecordingBackend)
    with pytest.raises(ConfigurationError, match=text):
        load_backend(name, **given)


async def test_a_codec_that_returns_no_bytes_fails_the_publish_and_nothing_is_sent() -> None:
    class Text(JSONCodec):
        def encode(self, payload: Any) -> Any:
            return super().encode(payload).decode()

    async with MemoryBackend(codec=Text()) as backend:
        with pytest.raises(PayloadError, match="the codec must return bytes, not str"):
            await backend.publish("a", {})
