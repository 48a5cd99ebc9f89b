"""The URL of the session store: what is accepted, and what is never shown."""

from __future__ import annotations

import re
import socket

import pytest

from specpool.errors import ConfigError
from specpool_router.config import RouterConfig
from specpool_router.server import make_store
from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_router.sessions.store_url import check_store_url, without_password

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:pw@h:1/0", "redis://:***@h:1/0"),
        ("rediss://u:p%40w@h:1", "rediss://u:***@h:1"),
        ("rediss://u:p@w@h:1", "rediss://u:***@h:1"),
        ("redis://pw@h", "redis://***@h"),
        ("redis://h?password=pw&db=1", "redis://h?password=***&db=1"),
        ("unix:///tmp/s?password=pw&db=1", "unix:///tmp/s?password=***&db=1"),
        ("unix:///tmp/s?password=p&w", "unix:///tmp/s?password=***&***"),
        ("h:6379", "h:6379"),
    ],
)
def test_what_is_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}/{SECRET}@h:1/0",
        f"redis://:{SECRET}#{SECRET}@h:1/0",
        f"redis://:{SECRET}?{SECRET}@h:1/0",
        f"redis://:{SECRET}@{SECRET}/@h:1/0",
        f"redis://:1/{SECRET}@h",
        f"redis://u:{SECRET}/0",
        f"redis://:[{SECRET}@h:1/0",
        f"redis://:{SECRET}]@h",
        f"redis://:{SECRET}\x00@h\x01",
        f"redis:/:{SECRET}@h",
        f":{SECRET}@h:6379",
        f"redis:{SECRET}/x",
        f"unix:///tmp/s?password={SECRET}#{SECRET}",
        f"unix:///tmp/s?password={SECRET}@{SECRET}",
        f"unix:///tmp/s?pasword={SECRET}",
        f"unix:///tmp/s?password={SECRET}&{SECRET}",
        f"http://u:{SECRET}@h",
        f"redis://:{SECRET}@h/{'abc'}",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("looked up"))
    with pytest.raises(ConfigError) as caught:
        make_store(RouterConfig(session_store=url))
    error = caught.value
    assert error.metadata["field"] == "session_store"
    assert SECRET not in f"{error} {error.metadata} {error.__cause__} {error.__context__}"
    assert SECRET not in without_password(url)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://h?foo=1", "unknown options; accepted after '?': db, username, password, client_name"),
        ("redis://h?ssl_cert_reqs=none", "unknown options"),
        ("rediss://h?ssl_cert_reqs=perhaps", "ssl_cert_reqs must be none, optional or required"),
        ("redis://h?db=x", "db must be the number of a database"),
        ("redis://h/abc", "must be the number of a database, as in /0"),
        ("redis://h/0/1", "must be the number of a database"),
        ("redis:///0", "the host is missing"),
        ("redis://h:99999/0", "percent-encoded"),
        ("http://h:1", "cannot be read"),
        ("h:6379", "cannot be read"),
        ("", "cannot be read"),
        ("unix://tmp/s", "absolute path of a socket"),
        ("unix://", "absolute path of a socket"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_accepted(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        check_store_url(url)
    assert "Accepted: redis://[USER:PASSWORD@]HOST[:PORT][/DB]" in caught.value.message


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://u:p%2Fw%23%40@h:7/3", {"host": "h", "port": 7, "db": 3, "username": "u", "password": "p/w#@"}),
        ("redis://:p@w@h", {"host": "h", "password": "p@w"}),
        ("redis://h/", {"host": "h"}),
        ("redis://[::1]:5/1\n", {"host": "::1", "port": 5, "db": 1}),
        ("unix:///tmp/s?db=2&password=p%26w", {"path": "/tmp/s", "db": 2, "password": "p&w"}),
        ("rediss://h?ssl_check_hostname=false&client_name=x", {"host": "h", "client_name": "x"}),
    ],
)
def test_what_is_accepted_means_what_it_says(url: str, expected: dict[str, object]) -> None:
    settings = RedisSessionStore(url)._redis.connection_pool.connection_kwargs
    assert {name: settings.get(name) for name in expected} == expected
