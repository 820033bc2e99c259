"""`spec.network` of containers: what it may say, and what connects them is told of it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads.drivers.face import Refused
from edge_runtime.workloads.drivers.network import ADDRESS, MAX_PORTS, Network, Port, connection, network

PUBLISH = ("127.0.0.1", "192.0.2.7")


def test_what_is_not_said_is_filled_in() -> None:
    assert network(None, PUBLISH) is None and network({}, ()) == Network(())
    told = network({"ports": [{"port": 80}, {"port": 53, "host_port": 5353, "protocol": "udp", "address": "192.0.2.7"}]}, PUBLISH)
    assert told == Network((Port("127.0.0.1", 80, 80, "tcp"), Port("192.0.2.7", 5353, 53, "udp")))
    known = connection("/usr/bin/slirp4netns", told, userns=True)
    assert [one["arguments"] for one in known["ports"]] == [
        {"proto": "tcp", "host_addr": "127.0.0.1", "host_port": 80, "guest_addr": ADDRESS, "guest_port": 80}, {"proto": "udp", "host_addr": "192.0.2.7", "host_port": 5353, "guest_addr": ADDRESS, "guest_port": 53}]
    assert {"--disable-host-loopback", "--enable-sandbox", "--enable-seccomp", "--userns-path=/proc/PID/ns/user"} <= set(known["command"])
    assert connection("slirp4netns", Network(()), userns=False)["ports"] == []
    assert network({"ports": [{"port": 80, "address": "198.51.100.1"}]}, ("0.0.0.0",)) is not None


@pytest.mark.parametrize(("told", "publish", "says"), [
    ("host", PUBLISH, "spec.network: "), ([], PUBLISH, "spec.network: "), ({"mode": "host"}, PUBLISH, "spec.network.mode"), ({"ports": {}}, PUBLISH, "not a list of up to"),
    ({"ports": [{"port": 80 + at} for at in range(MAX_PORTS + 1)]}, PUBLISH, "not a list of up to"), ({"ports": [80]}, PUBLISH, r"ports\[0\]: is no object"), ({"ports": [{"port": 80, "to": 1}]}, PUBLISH, "is no object"),
    ({"ports": [{"host_port": 80}]}, PUBLISH, r"ports\[0\]\.port: 'None'"), ({"ports": [{"port": 0}]}, PUBLISH, "is no port"), ({"ports": [{"port": 65_536}]}, PUBLISH, "is no port"), ({"ports": [{"port": True}]}, PUBLISH, "is no port"),
    ({"ports": [{"port": 80, "host_port": "8080"}]}, PUBLISH, "host_port: '8080'"), ({"ports": [{"port": 80, "protocol": "sctp"}]}, PUBLISH, "neither tcp nor udp"), ({"ports": [{"port": 80}]}, (), "lets no container publish"),
    ({"ports": [{"port": 80, "address": "0.0.0.0"}]}, PUBLISH, "none of those on which"), ({"ports": [{"port": 80, "address": "127.0.0.1/8080:80 -t all"}]}, ("0.0.0.0",), "none of those"), ({"ports": [{"port": 80, "address": "::1"}]}, ("0.0.0.0",), "none of"),
    ({"ports": [{"port": 80}, {"port": 81, "host_port": 80}]}, PUBLISH, r"ports\[1\]\.host_port: 80 is published twice"),
    ({"ports": [{"port": 80, "address": "192.0.2.7"}, {"port": 81, "host_port": 80, "address": "0.0.0.0"}]}, ("0.0.0.0",), "published twice"),
])
def test_what_cannot_be_is_refused(told: Any, publish: tuple[str, ...], says: str) -> None:
    with pytest.raises(Refused, match=says):
        network(told, publish)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ports", "port", "host_port", "address", "protocol", "x"]), inner, max_size=4), max_leaves=12)


@given(JSON, st.sampled_from([PUBLISH, (), ("0.0.0.0",)]))
def test_whatever_it_says_only_allowed_addresses_are_published(told: Any, publish: tuple[str, ...]) -> None:
    try:
        found = network(told, publish)
    except Refused as error:
        assert error.field.startswith("spec.network") and error.remedy
        return
    assert found is None or all((one.address in publish or "0.0.0.0" in publish) and one.address.count(".") == 3 and 0 < one.port < 65_536 and 0 < one.host_port < 65_536 for one in found.ports)
