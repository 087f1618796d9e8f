"""What the provider can be told, and how it complains."""

import re

import pytest

from abe.errors import ConfigurationError
from abe_backend_redis import RedisBackend, RedisSettings

SECRET = "swordfish-8061"


def test_the_defaults_are_a_local_server() -> None:
    settings = RedisSettings.from_env({})
    assert settings == RedisSettings()
    assert settings.url == "redis://localhost:6379/0"
    assert settings.address == "localhost:6379"


def test_every_setting_has_its_variable() -> None:
    settings = RedisSettings.from_env(
        {
            "REDIS_URL": "rediss://cache.example:7000/3?ssl_ca_certs=/etc/ca.pem",
            "REDIS_USERNAME": "app",
            "REDIS_PASSWORD": SECRET,
            "REDIS_CONNECT_TIMEOUT_SECONDS": "2.5",
            "QUEUE_NAMESPACE": "shop",
        }
    )
    assert settings.url.startswith("rediss://")
    assert (settings.username, settings.password, settings.connect_timeout) == ("app", SECRET, 2.5)
    assert settings.address == "cache.example:7000"
    assert settings.namespace == "shop"


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h/",
        "redis://h:1/15",
        "redis://[::1]:6379/0",
        "rediss://u:p@h:6380",
        "redis://:p%40%2F@h",
        "unix:///run/redis.sock",
        "unix:///run/redis.sock?db=2",
        "redis://h?ssl_ca_certs=/x",
    ],
)
def test_urls_that_redis_can_be_at(url: str) -> None:
    assert RedisSettings(url=url).url == url


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://h", "its scheme is 'http'"),
        (f"//:{SECRET}@h", "its scheme is ''"),
        (f"redis://:{SECRET}@", "the host is missing"),
        (f"redis://u:{SECRET}@h:0", "the port is 0"),
        (f"redis://u:{SECRET}@h:70000", "a port from 1 to 65535"),
        (f"redis://u:{SECRET}@h:port", "a port from 1 to 65535"),
        (f"redis://u:{SECRET}@[::1", "redis://"),
        (f"redis://u:{SECRET}@h/jobs", "the database must be a number"),
        (f"redis://u:{SECRET}@h/-1", "the database must be a number"),
        ("unix://", "the path is missing"),
        (f"redis://u:12#{SECRET}@h:6379/0", "must be percent-encoded"),
        (f"redis://u:12?{SECRET}@h:6379/0", "must be percent-encoded"),
        (f"redis://u:12/{SECRET}@h:6379", "must be percent-encoded"),
        (f"redis+sentinel://:{SECRET}@h/main", "redis+sentinel:// is not supported by this version"),
        (f"redis+cluster://:{SECRET}@h", "redis+cluster:// is not supported by this version"),
        (f"rediss+sentinel://:{SECRET}@h", "rediss+sentinel:// is not supported by this version"),
        (f"rediss+cluster://:{SECRET}@h", "rediss+cluster:// is not supported by this version"),
    ],
)
def test_a_bad_url_is_named_with_what_is_wrong_and_without_its_password(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(complaint)) as caught:
        RedisSettings.from_env({"REDIS_URL": url})
    assert "REDIS_URL" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_url_must_be_text() -> None:
    with pytest.raises(ConfigurationError, match="REDIS_URL"):
        RedisSettings(url=6379)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_the_time_to_connect_is_a_number_of_seconds(text: str) -> None:
    with pytest.raises(ConfigurationError, match="REDIS_CONNECT_TIMEOUT_SECONDS"):
        RedisSettings.from_env({"REDIS_CONNECT_TIMEOUT_SECONDS": text})


def test_no_repr_shows_a_credential() -> None:
    settings = RedisSettings(url=f"redis://app:{SECRET}@h", password=SECRET)
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)
    assert SECRET not in settings.address
    assert SECRET not in repr(RedisBackend(settings))


@pytest.mark.parametrize("name", ["USERNAME", "PASSWORD"])
def test_a_credential_given_twice_and_differently_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"REDIS_{name} and REDIS_URL both have one") as caught:
        RedisSettings.from_env({"REDIS_URL": f"redis://one:{SECRET}@h", f"REDIS_{name}": f"other-{SECRET}"})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("password", [SECRET, "p@ss/w:rd%", "50%25"])
def test_a_credential_given_twice_and_alike_is_accepted(password: str) -> None:
    quoted = password.replace("%", "%25").replace("@", "%40").replace("/", "%2F").replace(":", "%3A")
    settings = RedisSettings(url=f"redis://app:{quoted}@h", username="app", password=password)
    assert settings.password == password


def test_the_backend_is_made_from_the_environment_without_input_or_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("QUEUE_LEASE_SECONDS", "7")
    backend = RedisBackend.from_env()
    assert backend.settings.url == "redis://127.0.0.1:1/0"
    assert backend.capabilities.lease == 7.0
