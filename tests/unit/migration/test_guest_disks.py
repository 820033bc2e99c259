"""Disks that are offered and asked for, and the tunnel that their bytes go through."""

import socket
import string
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_migration import guest_disks, keys, qemu_disks, wire
from gpu_migration.errors import DestinationError, FormatError
from gpu_migration.guest_disks import DISKS_MOST, FORMATS, SECTOR, Disk
from gpu_migration.tunnel import Tunnel

NAMES = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=31).filter(guest_disks.named)
DISKS = st.builds(Disk, NAMES, st.sampled_from(FORMATS), st.integers(1, 1 << 40).map(lambda sectors: sectors * SECTOR), st.integers(0, (1 << 64) - 1))
OFFERS = st.lists(DISKS, max_size=DISKS_MOST, unique_by=lambda disk: disk.name)
PATIENCE = 30.0


@given(OFFERS)
def test_an_offer_arrives_as_it_was_made(offer: list[Disk]) -> None:
    assert guest_disks.unpack(guest_disks.pack(offer)) == offer


@given(OFFERS, st.data())
def test_a_damaged_offer_is_refused_or_is_another_one(offer: list[Disk], data: st.DataObject) -> None:
    packed = bytearray(guest_disks.pack(offer))
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(FormatError):
        guest_disks.unpack(packed[:cut])
    with pytest.raises(FormatError):
        guest_disks.unpack(packed + b"\0")
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = guest_disks.unpack(packed)
    except FormatError:
        return
    assert guest_disks.pack(found) == bytes(packed)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_offer_or_an_error(raw: bytes) -> None:
    try:
        found = guest_disks.unpack(raw)
    except FormatError:
        return
    assert guest_disks.pack(found) == raw


@given(OFFERS)
def test_what_is_asked_for_is_taken_from_the_offer_and_nothing_else(offer: list[Disk]) -> None:
    wanted = {disk.name: disk.format for disk in offer[::2]}
    assert guest_disks.chosen(wanted, offer) == offer[::2]
    if offer:
        with pytest.raises(DestinationError, match="node-name"):
            guest_disks.chosen({offer[0].name: offer[0].format}, offer[1:])
        with pytest.raises(DestinationError, match="same format"):
            guest_disks.chosen({offer[0].name: "none"}, offer)


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("driver=raw,node-name=root,file.driver=file,file.filename={disk:root}", "raw"), ("node-name=root,file.driver=file,file.filename={disk:root},driver=qcow2", "qcow2"), ("if=none,format=qcow2,file={disk:root}", "qcow2"),
        ('{"driver": "qcow2", "node-name": "root", "file": {"driver": "file", "filename": "{disk:root}"}}', "qcow2"), ('{"node-name":"root","file":{"driver":"file","filename":"{disk:root}"},"driver":"raw"}', "raw"),
    ],
)
def test_a_command_line_says_what_comes(word: str, kind: str) -> None:
    command = ["qemu-system-x86_64", "-blockdev", word, "-device", "virtio-blk-pci,drive=root"]
    assert guest_disks.asked(command) == {"root": kind}
    assert guest_disks.placed(command, {"root": "/x/root"})[2] == word.replace("{disk:root}", "/x/root")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("driver=file,node-name=file,filename={disk:root}", "its format"), ("driver=raw,file.filename={disk:#block12}", "names no disk"), ("driver=raw,file.filename={disk:}", "names no disk"),
        ("driver=rawer,file.filename={disk:root}", "its format"), ("driver=vmdk,file.filename={disk:root}", "its format"), ("file.driver=raw,filename={disk:root}", "its format"),
    ],
)
def test_a_command_line_that_does_not_is_refused(word: str, said: str) -> None:
    with pytest.raises(DestinationError, match=said):
        guest_disks.asked(["qemu-system-x86_64", "-blockdev", word])


def test_limits_of_a_command_line() -> None:
    with pytest.raises(DestinationError, match="at most"):
        guest_disks.asked([f"driver=raw,file.filename={{disk:d{number}}}" for number in range(DISKS_MOST + 1)])
    with pytest.raises(DestinationError, match="two formats"):
        guest_disks.asked(["driver=raw,file.filename={disk:a}", "driver=qcow2,file.filename={disk:a}"])
    with pytest.raises(DestinationError, match="make room"):
        guest_disks.fits([Disk("a", "raw", 1024, 600), Disk("b", "raw", 1024, 600)], 1199, "here")
    guest_disks.fits([Disk("a", "raw", 1024, 600), Disk("b", "raw", 1024, 600)], 1200, "here")
    for size, said in ((512, "too small"), (2048, "too large")):
        with pytest.raises(DestinationError, match=said):
            guest_disks.same_size(Disk("a", "raw", 1024, 0), size, "here")


def test_what_qemu_says_of_its_disks() -> None:
    """As `query-block` of version 10 says it."""
    image = {"virtual-size": 8388608, "filename": "/srv/root", "format": "qcow2", "actual-size": 1052672}
    node = {"node-name": "root", "drv": "qcow2", "ro": False, "encrypted": False, "image": image, "file": "/srv/root"}
    assert qemu_disks.disk_of({"device": "", "qdev": "/machine/peripheral-anon/device[0]/virtio-backend", "inserted": node}) == Disk("root", "qcow2", 8388608, 1052672)
    assert qemu_disks.disk_of({"device": "cd", "locked": False}) is None
    for other in ({"ro": True}, {"node-name": "#block127"}, {"node-name": ""}):
        assert qemu_disks.disk_of({"inserted": node | other}) is None
    for other in ({"drv": "vmdk"}, {"image": image | {"encrypted": True}}):
        disk = qemu_disks.disk_of({"inserted": node | other})
        assert disk is not None
        with pytest.raises(DestinationError, match="encrypted or of another format"):
            guest_disks.chosen({"root": "qcow2"}, [disk])


class Ends:
    """Two tunnels, one at each end of a stream, and the sockets outside them."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        key, found = bytes(range(32)), list[wire.Stream]()
        answering = threading.Thread(target=lambda: found.append(wire.answer(listener.accept()[0], key)[0]))
        answering.start()
        calling = wire.call(listener.getsockname(), key, bytes(keys.TRANSFER_ID))
        answering.join()
        listener.close()
        self.outside, self.tunnels = list[socket.socket](), list[Tunnel]()
        for stream in (calling, found[0]):
            out, inside = socket.socketpair()
            out.settimeout(PATIENCE)
            self.outside.append(out)
            self.tunnels.append(Tunnel(inside, stream, PATIENCE))

    def close(self) -> None:
        for tunnel in self.tunnels:
            tunnel.close()
        for out in self.outside:
            out.close()


def read(sock: socket.socket, size: int) -> bytes:
    out = bytearray()
    while len(out) < size and (part := sock.recv(1 << 20)):
        out += part
    return bytes(out)


@pytest.mark.parametrize("ending", [0, 1])
def test_a_tunnel_carries_both_ways_and_ends_with_either_end(ending: int) -> None:
    ends = Ends()
    try:
        payload = bytes(range(256)) * 20_000
        both: list[bytes] = []
        threads = [threading.Thread(target=out.sendall, args=(payload,)) for out in ends.outside]
        threads.append(threading.Thread(target=lambda: both.append(read(ends.outside[1], len(payload)))))
        for thread in threads:
            thread.start()
        assert read(ends.outside[0], len(payload)) == payload
        for thread in threads:
            thread.join(PATIENCE)
        assert both == [payload] and ends.tunnels[0].sent == len(payload)
        ends.outside[ending].close()
        assert ends.outside[1 - ending].recv(1) == b""
    finally:
        ends.close()


def test_a_tunnel_takes_nothing_but_its_own_records() -> None:
    ends = Ends()
    try:
        ends.tunnels[0]._stream.send(wire.Kind.PATCH, b"x")
        assert ends.outside[1].recv(1) == b"" and ends.outside[0].recv(1) == b""
    finally:
        ends.close()
