"""Containers that ask for a network: what reaches them, what they reach, and that nothing stays behind. Real slirp4netns; all connections end on this machine."""

import asyncio
import os
import signal
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import container_laying
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Ability, Key, Order, Phase, Refused
from edge_runtime.workloads.drivers.instance import read
from edge_runtime.workloads.drivers.network import GATEWAY, RESOLVER

from .container_side import driver, output, started  # noqa: F401 driver is a fixture
from .waiting import until

SERVE = "echo from inside > /tmp/index.html; exec busybox httpd -f -p 80 -h /tmp"


@pytest.fixture
async def connected(driver: ContainerDriver) -> ContainerDriver:  # noqa: F811
    told = await driver.probe()
    if not told.can(Ability.NETWORK):
        pytest.skip(f"containers have no network here: {told.cannot[Ability.NETWORK]}")
    return driver


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def fetched(port: int) -> str:
    """What a web server on loopback answers; empty where none does."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /index.html HTTP/1.0\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        return answer.rpartition("\r\n\r\n")[2]
    except OSError:
        return ""


def connectors(driver: ContainerDriver, key: Key) -> list[int]:  # noqa: F811
    """Processes that connect an instance: children of its keeper."""
    keeper = int(read(driver.folder(key) / "running.json")["keeper"])  # type: ignore[index]
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and b"slirp4netns" in (entry / "cmdline").read_bytes() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == keeper:
                found.append(int(entry.name))
    return found


async def test_a_published_port_answers_on_the_node_until_the_container_ends(connected: ContainerDriver) -> None:
    port = free_port()
    key = await started(connected, "web", SERVE, network={"ports": [{"port": 80, "host_port": port}]})

    async def there() -> bool:
        return await fetched(port) == "from inside\n"

    await until(there, what="the answer from inside")
    (pid,) = connectors(connected, key)
    said = Path(f"/proc/{pid}/status").read_text()
    assert "Seccomp:\t2" in said and "CapEff:\t0000000000000400" in said, "no right but that to low ports"
    assert os.readlink(f"/proc/{pid}/ns/mnt") not in (os.readlink("/proc/self/ns/mnt"), os.readlink(f"/proc/{os.getppid()}/ns/mnt"))
    await connected.stop(key, 0.0)
    assert await fetched(port) == "" and not Path(f"/proc/{pid}").exists()
    await connected.delete(key)


async def test_what_a_container_sees_of_its_network(connected: ContainerDriver) -> None:
    status, out, err = await output(connected, "sees", "cat /etc/resolv.conf /etc/hosts; busybox ip -4 -o addr | busybox awk '{print $2, $4}'; echo x > /etc/hosts || echo refused", network={})
    assert (status.phase, out) == (Phase.ENDED, f"nameserver {RESOLVER}\n127.0.0.1 localhost\n::1 localhost\n10.0.2.100 sees\nlo 127.0.0.1/8\n" + out.split("lo 127.0.0.1/8\n")[1]), err
    assert out.split("lo 127.0.0.1/8\n")[1].split()[1] == "10.0.2.100/24" and out.endswith("refused\n")
    _, out, _ = await output(connected, "without", "busybox ip -4 -o addr | busybox awk '{print $2, $4}'; cat /etc/resolv.conf || echo none")
    assert out == "lo 127.0.0.1/8\nnone\n"


@pytest.mark.parametrize("open_gateway", [False, True], ids=["as it is", "control: with the gateway open"])
async def test_programs_on_the_nodes_loopback_cannot_be_reached(open_gateway: bool, connected: ContainerDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    if open_gateway:
        real = container_laying.connection

        def open_one(*those: Any) -> dict[str, Any]:
            made = real(*those)
            return {**made, "command": [word for word in made["command"] if word != "--disable-host-loopback"]}

        monkeypatch.setattr(container_laying, "connection", open_one)
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(100))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await output(connected, "reach", f"echo hello | busybox nc -w 2 {GATEWAY} {port}", network={})
    server.close()
    assert seen == ([b"hello\n"] if open_gateway else [])


async def test_a_container_reaches_what_the_node_reaches(connected: ContainerDriver) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))  # nothing is sent: it tells the node's own address
        except OSError:
            pytest.skip("this machine has no address but loopback's, which containers do not reach")
        address = one.getsockname()[0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"got " + await reader.readline())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, address, 0)
    port = server.sockets[0].getsockname()[1]
    _, out, err = await output(connected, "out", f"echo hello | busybox nc -w 5 {address} {port}", network={})
    server.close()
    assert out == "got hello\n", err


async def test_a_port_that_is_taken_is_told_and_nothing_is_left(connected: ContainerDriver) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Refused, match=rf"spec.network.ports: port {port} \(tcp\) of 127.0.0.1 cannot be had"):  # so the hub looks for another node
            await started(connected, "second", SERVE, network={"ports": [{"port": 80, "host_port": port}]})
    key = Key("second", 1)
    assert (await connected.status(key)).phase is Phase.ENDED
    await connected.delete(key)


async def test_what_connects_it_is_started_again_and_ends_with_its_keeper(connected: ContainerDriver) -> None:
    port = free_port()
    key = await started(connected, "again", SERVE, network={"ports": [{"port": 80, "host_port": port}]})
    (first,) = connectors(connected, key)
    os.kill(first, signal.SIGKILL)

    async def back() -> bool:
        return await fetched(port) == "from inside\n" and connectors(connected, key) not in ([], [first])

    await until(back, what="another one, and the answer through it")
    (second,) = connectors(connected, key)
    os.kill(int(read(connected.folder(key) / "running.json")["keeper"]), signal.SIGKILL)  # type: ignore[index]
    await until(lambda: not Path(f"/proc/{second}/root").exists(), what="its end")
    await connected.delete(key)


async def test_a_node_that_gives_no_network_refuses(connected: ContainerDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert connected._ways is not None
    monkeypatch.setattr(connected, "_ways", replace(connected._ways, connector="", unconnected="switched off by the configuration"))
    with pytest.raises(Refused, match="no network on this node: switched off"):
        await connected.prepare(Order(Key("none", 1), "box:1", {}, {"network": {}}))
    assert not connected.folder(Key("none", 1)).exists()
