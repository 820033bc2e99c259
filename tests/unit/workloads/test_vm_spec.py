"""What a document of kind `vm` may ask for."""

from dataclasses import replace
from typing import Any

import pytest

from edge_runtime.workloads.drivers import vm_machine
from edge_runtime.workloads.drivers.face import Key, Order, Refused
from edge_runtime.workloads.drivers.vm_machine import BIOS, KERNEL, Layer, Shape
from edge_runtime.workloads.drivers.vm_spec import INNER, Offer, hardware_address, machine

OFFER = Offer(False, "", 10 << 20, False, "tcg", 4, 8 << 30, ("127.0.0.1",))


def asked(spec: dict[str, Any] | None = None, requests: dict[str, int] | None = None, offer: Offer = OFFER) -> Any:
    return machine(Order(Key("Web:1", 3), "vm:1", requests or {}, spec or {}), offer)


def test_what_stands_where_nothing_is_said() -> None:
    vm = asked()
    assert vm.shape == Shape(256, 1, BIOS, False, "tcg") and vm.disk_bytes == 10 << 20 and vm.hostname == "web-1" and vm.network is None and not vm.template and vm.boot_s == 60
    vm = asked({"network": {"ports": [{"port": 80, "host_port": 8080}, {"port": 53, "protocol": "udp"}]}}, {"cpu": 1500, "memory": (100 << 20) + 1, "disk": 20 << 20}, replace(OFFER, kernel=True, arguments="quiet"))
    assert vm.shape == Shape(101, 2, KERNEL, True, "tcg") and vm.disk_bytes == 20 << 20 and vm.arguments == "quiet"
    assert vm.forwards == [("tcp", INNER, 80), ("udp", INNER + 1, 53)] and [(port.host_port, port.port) for port in vm.outside.ports] == [(8080, INNER), (53, INNER + 1)]


@pytest.mark.parametrize(("spec", "requests", "field"), [
    ({"command": ["sh"]}, {}, "spec.command"), ({"boot": "tape"}, {}, "spec.boot"), ({"boot": "kernel"}, {}, "spec.boot"), ({"boot": "uefi"}, {}, "spec.boot"), ({"arguments": "quiet"}, {}, "spec.arguments"),
    ({"cpus": 5}, {}, "spec.cpus"), ({"cpus": True}, {}, "spec.cpus"), ({}, {"cpu": 40_000}, "spec.cpus"), ({}, {"memory": 1 << 20}, "requests.memory"), ({}, {"memory": 9 << 30}, "requests.memory"),
    ({}, {"disk": 1 << 20}, "requests.disk"), ({"hostname": "a_b"}, {}, "spec.hostname"), ({"cloud_init": {"vendor": ""}}, {}, "spec.cloud_init.vendor"), ({"cloud_init": {"user_data": 1}}, {}, "spec.cloud_init.user_data"),
    ({"cloud_init": []}, {}, "spec.cloud_init"), ({"template": "yes"}, {}, "spec.template"), ({"when_moved": "stay"}, {}, "spec.when_moved"), ({"boot_s": 1000}, {}, "spec.boot_s"), ({"boot_s": "1"}, {}, "spec.boot_s"), ({"network": {"ports": [{"port": 0}]}}, {}, "spec.network"),
    ({"network": {"ports": [{"port": 80, "address": "0.0.0.0"}]}}, {}, "spec.network"),
])
def test_what_cannot_be_is_refused_by_name(spec: dict[str, Any], requests: dict[str, int], field: str) -> None:
    with pytest.raises(Refused) as told:
        asked(spec, requests)
    assert told.value.field.startswith(field) and told.value.remedy


def test_a_bridge_is_one_that_the_node_has_named() -> None:
    offer = replace(OFFER, publish=None, bridges=("br0",))
    vm = asked({"network": {"tap": "br0"}}, offer=offer)
    assert vm.bridge == "br0" and vm.network is None and vm.shape.network and not vm.forwards
    for odd in ("br1", "", 7, None, ["br0"]):
        with pytest.raises(Refused, match="is no bridge of this node"):
            asked({"network": {"tap": odd}}, offer=offer)
    with pytest.raises(Refused, match=r"spec.network.ports: is not for a port of a bridge"):
        asked({"network": {"tap": "br0", "ports": []}}, offer=offer)
    with pytest.raises(Refused, match="one hardware address"):
        asked({"network": {"tap": "br0"}, "template": True}, offer=offer)
    told = {hardware_address(f"vm-{number}") for number in range(1000)}
    assert len(told) == 1000 and all(int(one[:2], 16) & 3 == 2 and len(one) == 17 for one in told)
    words = vm_machine.command("qemu", Shape(128, 1, BIOS, True), "m", [], hardware_address="02:00:00:00:00:01")
    assert "tap,id=net,fd={tap}" in words and any(word.endswith("mac=02:00:00:00:00:01") for word in words) and not any("hostfwd" in word for word in words)


def test_a_network_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(Refused, match="slirp4netns is not here"):
        asked({"network": {}}, offer=replace(OFFER, publish=None, no_network="slirp4netns is not here"))


def test_the_command_line() -> None:
    words = vm_machine.command("qemu", Shape(128, 2, BIOS, True), vm_machine.anonymous(Shape(128, 2)), vm_machine.chain("disk", [Layer("raw", 1), Layer("qcow2", 2)], True), [("tcp", 20_000, 80)])
    blocks = [words[at + 1] for at, word in enumerate(words) if word == "-blockdev"]
    assert "read-only=on" in blocks[0] and blocks[1].endswith("backing=disk-0") and "read-only=off" in blocks[1] and "node-name=disk," in blocks[1]
    assert "user,id=net,ipv6=off,hostfwd=tcp::20000-:80" in words and any(word.startswith("on,obsolete=deny") for word in words)
    assert "-netdev" not in vm_machine.command("qemu", Shape(128, 1), "m", [])
