"""Static, DNS and told directories, and their text form."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Collection

import pytest

from specpool.discovery import directory
from specpool.discovery.discovery import Discovery, Endpoint, StaticDiscovery
from specpool.discovery.dns import DnsDiscovery, addresses_of
from specpool.discovery.messages import from_messages, to_messages
from specpool.discovery.told import ToldDiscovery
from specpool.errors import ConfigError, InvalidArgument
from specpool.v1.types_pb2 import SpeculatorEndpoint

A, B = Endpoint("a:1"), Endpoint("b:2")


async def becomes(found: Discovery, *wanted: Endpoint) -> None:
    async with asyncio.timeout(30):
        while found.endpoints != set(wanted):
            await asyncio.sleep(0.005)


class Name:
    """What a name resolves to, settable; counts lookups."""

    def __init__(self) -> None:
        self.hosts: Collection[str] | OSError = ()
        self.num_lookups = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def resolve(self, name: str) -> Collection[str]:
        assert name == "pool"
        self.num_lookups += 1
        self.may_answer.wait(60)
        if isinstance(self.hosts, OSError):
            raise self.hosts
        return self.hosts

    async def looked_up_again(self) -> None:
        before = self.num_lookups
        async with asyncio.timeout(30):
            while self.num_lookups < before + 2:
                await asyncio.sleep(0.005)


async def test_dns_lists_all_addresses_of_both_families_and_follows() -> None:
    name = Name()
    name.hosts = ["10.0.0.1", "fd00::1"]
    found = DnsDiscovery("pool", 7, interval_s=0.01, resolve=name.resolve)
    await found.start()
    try:
        await becomes(found, Endpoint("10.0.0.1:7"), Endpoint("[fd00::1]:7"))
        name.hosts = ["10.0.0.9"]
        await becomes(found, Endpoint("10.0.0.9:7"))
    finally:
        await found.close()


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_NONAME, "no such name"), TimeoutError("no answer")])
async def test_dns_keeps_the_last_answer_when_lookups_fail(
    error: OSError, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    name = Name()
    name.hosts = ["10.0.0.1"]
    found = DnsDiscovery("pool", 7, interval_s=0.01, resolve=name.resolve)
    await found.start()
    try:
        await becomes(found, Endpoint("10.0.0.1:7"))
        name.hosts = error
        await name.looked_up_again()
        await name.looked_up_again()
        assert found.endpoints == {Endpoint("10.0.0.1:7")}
        assert len([r for r in caplog.records if "the last answer stays" in r.message]) == 1
        name.hosts = ["10.0.0.2"]
        await becomes(found, Endpoint("10.0.0.2:7"))
    finally:
        await found.close()


async def test_a_resolver_that_hangs_stops_nobody() -> None:
    name = Name()
    name.hosts = ["10.0.0.1"]
    name.may_answer.clear()
    found = DnsDiscovery("pool", 7, interval_s=0.01, resolve=name.resolve)
    async with asyncio.timeout(30):
        await found.start()
        while not name.num_lookups:
            await asyncio.sleep(0.005)
        await found.close()
    name.may_answer.set()
    await asyncio.sleep(0)
    assert found.endpoints == frozenset()
    assert name.num_lookups == 1


def test_the_systems_resolver() -> None:
    assert addresses_of("127.0.0.1") == {"127.0.0.1"}
    assert addresses_of("::1") == {"::1"}
    assert addresses_of("localhost") & {"127.0.0.1", "::1"}


async def test_told_is_the_union_of_what_was_named_lately() -> None:
    found = ToldDiscovery(forget_after_s=30.0)
    changes: list[frozenset[Endpoint]] = []
    found.on_change(changes.append)
    await found.start()
    found.tell([A])
    found.tell([B])
    found.tell([])
    found.tell([A])
    assert changes == [frozenset({A}), frozenset({A, B})]
    leaving = Endpoint("a:1", terminating=True, labels={"zone": "z"})
    found.tell([leaving])
    assert found.endpoints == {leaving, B}
    await found.close()


async def test_told_forgets_what_nobody_names() -> None:
    found = ToldDiscovery(forget_after_s=0.5)
    found.tell([A, B])
    async with asyncio.timeout(30):
        while B in found.endpoints:
            found.tell([A])
            await asyncio.sleep(0.01)
    assert found.endpoints == {A}
    await becomes(found)
    await found.close()


def test_told_is_bounded() -> None:
    async def tell() -> int:
        found = ToldDiscovery()
        found.tell(Endpoint(f"a:{port}") for port in range(10_000))
        await found.close()
        return len(found.endpoints)

    assert asyncio.run(tell()) == 4096


def test_messages_say_what_targets_need() -> None:
    leaving = Endpoint("a:1", labels={"zone": "z"}, terminating=True)
    assert from_messages(to_messages({leaving, B})) == [leaving, B]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([SpeculatorEndpoint(address="nowhere")], "speculators.address"),
        ([SpeculatorEndpoint(address="a:" + "1" * 10_000)], "speculators.address"),
        ([SpeculatorEndpoint(address="a:1", labels={str(i): "" for i in range(100)})], "speculators.labels"),
        ([SpeculatorEndpoint(address="a:1", labels={"zone": "z" * 10_000})], "speculators.labels"),
        ([SpeculatorEndpoint(address="a:1")] * 5_000, "speculators"),
    ],
)
def test_messages_are_checked_where_they_enter(messages: list[SpeculatorEndpoint], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        from_messages(messages)
    assert caught.value.metadata["field"] == field
    assert len(caught.value.message) < 1_000


async def test_text_forms() -> None:
    static = directory.parse("static:a:1, [fd00::1]:2")
    assert isinstance(static, StaticDiscovery)
    await static.start()
    assert static.endpoints == {Endpoint("a:1"), Endpoint("[fd00::1]:2")}
    assert isinstance(directory.parse("dns:pool.ns.svc:50051"), DnsDiscovery)
    assert isinstance(directory.parse("router"), ToldDiscovery)
    kubernetes = directory.parse("kubernetes:ns/app=speculator,tier in (a, b)")
    assert type(kubernetes).__name__ == "KubernetesDiscovery"


@pytest.mark.parametrize(
    "text", ["", "static:", "dns:", "kubernetes:ns", "kubernetes:/a=b", "router:x", "a:1", "etcd:x"]
)
def test_what_is_no_directory_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"speculators is .*; accepted: static:HOST:PORT") as caught:
        directory.parse(text, field="speculators")
    assert caught.value.metadata["field"] == "speculators"


@pytest.mark.parametrize("text", ["static:a", "static:a:1,,b:2", "dns:name", "dns:name:99999"])
def test_bad_addresses_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="address must be HOST:PORT"):
        directory.parse(text)


def test_labels_say_where_a_process_runs() -> None:
    assert directory.parse_labels(["node=n1", "zone=", "rack=r=7"]) == {"node": "n1", "rack": "r=7"}
    for entry in ("node", "colour=red", "=x"):
        with pytest.raises(ConfigError, match="accepted: node=NAME, zone=NAME"):
            directory.parse_labels([entry])


def test_needs_neither_kubernetes_nor_torch() -> None:
    code = (
        "import sys; from specpool.discovery import directory\n"
        "directory.parse('static:a:1'), directory.parse('dns:a:1'), directory.parse('router')\n"
        "assert not {'kubernetes', 'torch', 'grpc'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
