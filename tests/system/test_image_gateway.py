"""The gateway's image, as a site has it: a device comes to its broker over the network, is decided for with and without the hub, and gets over a broker that is killed, power that is cut, and a broker whose own file is damaged."""

from pathlib import Path

import pytest

from firmware_images import broker, tools
from firmware_images.build import Built, current
from firmware_images.errors import FirmwareError
from tests.integration.edges import MOSQUITTO
from tests.integration.waiting import until_sync
from tests.system.gateway_side import ARCH, NAME, OVEN, PROFILE, Device, gateway, keys, refused
from tests.system.image_device import BOOT_S, HOME

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def built() -> Built:
    """The image of this code."""
    if not MOSQUITTO:
        pytest.skip("no mosquitto: apt install mosquitto")
    try:
        tools.require([*tools.BUILD, ARCH.qemu, "openssl"])
        return current(HOME, ARCH, PROFILE, print)
    except FirmwareError as error:
        if error.field in ("tools", "network", "space"):
            pytest.skip(f"no image can be built here: {error}")
        raise


def test_a_device_of_a_gateways_site_is_decided_for_whatever_ends_meanwhile(built: Built, tmp_path: Path) -> None:
    given = keys(tmp_path / "keys")
    with gateway(built, tmp_path, given) as node:
        with node.on() as machine:
            oven = Device(node.ports["devices"], tmp_path / "keys" / broker.CERTIFICATE)
            numbers = oven.heat(3)
            oven.vented(numbers, machine)
            node.exact(numbers)

            node.put(f"/api/v1/edges/{NAME}/desired", {"twins": {OVEN: {"door": "shut"}}})
            until_sync(lambda: any(one["desired"] == {"door": "shut"} for one in oven.desired), BOOT_S, "the twin's desired state at the device")
            until_sync(lambda: any(record["body"]["reported"] == {"door": "shut"} for record in node.records("event") if record["kind"] == "twin.reported"), BOOT_S, "the twin's reported state at the hub")
            assert any(record["body"]["kind"] == "oven" for record in node.records("event") if record["kind"] == "device.registered")

            # The broker is killed before it has kept anything: what it was to keep for the device comes from the agent again.
            node.door("kill")
            until_sync(lambda: int(node.door("look")[0]) >= 1, BOOT_S, "the broker's second start")
            oven.desired.clear()
            numbers += oven.heat(5)
            oven.vented(numbers, machine)
            until_sync(lambda: any(one["desired"] == {"door": "shut"} for one in oven.desired), BOOT_S, "the twin's desired state, which the broker has forgotten")

            oven.said_elsewhere()
            node.hub.__exit__()
            alone = oven.heat(20)
            numbers += alone
            oven.vented(alone, machine)
            node.hub.__enter__()
            node.exact(numbers)

            stranger = Device(node.ports["devices"], tmp_path / "keys" / broker.CERTIFICATE, OVEN, "guessed")
            until_sync(lambda: stranger.refused, BOOT_S, "a wrong password's refusal")
            stranger.end()

        # The power is gone; the device goes on measuring.
        numbers += oven.heat(5)
        with node.on() as machine:
            numbers += oven.heat(5)
            oven.vented(numbers, machine)
            node.exact(numbers)
            assert node.readings("oven-2") == [], "a device speaks for itself alone"

            node.door("damage")
            numbers += oven.heat(5)
            oven.vented(numbers, machine)
            assert "mosquitto.db.damaged" in node.door("look")
            node.exact(numbers)
            oven.end()


def test_control_without_the_word_at_its_end_a_broker_whose_file_is_damaged_never_comes_back(built: Built, tmp_path: Path) -> None:
    with gateway(built, tmp_path, keys(tmp_path / "keys"), {"systemd.unit-dropin.novacron-broker.service~91-as-it-was": "[Service]\nExecStopPost=\n"}) as node, node.on() as machine:
        oven = Device(node.ports["devices"], tmp_path / "keys" / broker.CERTIFICATE)
        oven.vented(oven.heat(1), machine)
        node.door("damage")
        begun = int(node.door("look")[0])
        until_sync(lambda: int(node.door("look")[0]) > begun + 5, BOOT_S, "starts that end at once")
        assert not oven.connected
        oven.end()


def test_a_gateway_that_was_given_no_passwords_has_nothing_on_the_network_for_devices(built: Built, tmp_path: Path) -> None:
    with gateway(built, tmp_path, []) as node, node.on() as machine:
        machine.wait_for("no device reaches the broker over the network", BOOT_S)
        machine.wait_for("end of report", BOOT_S)
        told = machine.between("listening:", "failed:")
        ports = {int(line.rpartition(":")[2], 16) for line in told if line.startswith("/proc/net/tcp")}
        assert broker.PORT in ports and broker.DEVICES_PORT not in ports
        assert f"/proc/net/tcp 0100007F:{broker.PORT:04X}" in told, "the agent's, on loopback alone"
        assert refused(node.ports["devices"])
