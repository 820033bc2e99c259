"""The network of one workload that may change its form: a small Ethernet of its own, in a network namespace that outlives the container and the guest. Run as a script, with nothing of the package imported.

    python -I -S segment.py serve FOLDER LOCK      holds the namespace and the program that connects it (slirp4netns); ends with TERM
    python -I -S segment.py attach FOLDER PORT     the hook of a container: gives it its interface; its state comes on stdin

In the namespace is a bridge with the connecting program's end, and a port for whoever is the workload at the moment. All have the same address and hardware address, so that a connection goes on
where it was: a port takes part only while it is plugged in, and while the connecting program is held nothing is sent and nothing is lost, as the node's kernel keeps what clients write.

    segment.json    pid and start of this process, and of the connecting program
"""

import fcntl
import json
import os
import selectors
import signal
import struct
import subprocess
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "drivers"))
if __package__:
    from ..drivers.keeper_network import Network
    from ..drivers.keeper_restore import CLONE_NEWNET
    from ..drivers.keeping import PR_SET_NAME, Trouble, check, libc, started_ticks, tell, write
else:
    from keeper_network import Network  # type: ignore[import-not-found,no-redef]
    from keeper_restore import CLONE_NEWNET  # type: ignore[import-not-found,no-redef]
    from keeping import PR_SET_NAME, Trouble, check, libc, started_ticks, tell, write  # type: ignore[import-not-found,no-redef]

BRIDGE, UPLINK, INSIDE = "br0", "uplink", "eth0"
"""Names of interfaces: the bridge, the connecting program's, and what the workload sees."""

ADDRESS, GATEWAY, BITS = "10.0.2.100", "10.0.2.2", 24
"""As a container with `spec.network` has them (`drivers.network`)."""

HARDWARE = "02:6e:6f:76:61:01"
"""The workload's, in every form: the other end keeps it in its table."""

GATEWAY_HARDWARE = "52:55:0a:00:02:02"
"""The connecting program's (libslirp makes it of its address). Told beforehand: who asks for it while nothing is plugged in asks again a second later."""

MTU = 1500
"""Bytes of a packet. A connection has agreed on it once, so that all forms must have the same; what QEMU's interface takes without offloads."""

COMMAND_S = 20.0
"""`ip` takes milliseconds."""

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def address() -> dict[str, str]:
    """As a guest's scripts are told it."""
    return {"HARDWARE": HARDWARE, "MTU": str(MTU), "ADDRESS": f"{ADDRESS}/{BITS}", "GATEWAY": GATEWAY, "GATEWAY_HARDWARE": GATEWAY_HARDWARE}


def ip(*words: str) -> None:
    """One command of iproute2, in the network namespace that this process is in. Raises `Trouble`."""
    try:
        done = subprocess.run(["ip", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Trouble(f"ip {' '.join(words)}: {error}") from None
    if done.returncode:
        raise Trouble(f"ip {' '.join(words)}: {done.stderr.strip()[:500]}")


def enter(path: str) -> None:
    """Into a network namespace, until another one is entered."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(libc.setns(descriptor, CLONE_NEWNET), "entering the network namespace")
    finally:
        os.close(descriptor)


def known(folder: str) -> dict:  # type: ignore[type-arg]
    """What `segment.json` says. Raises `Trouble` where there is no such network, or its holder has gone."""
    try:
        with open(os.path.join(folder, "segment.json")) as handle:
            told = json.load(handle)
        if started_ticks(told["pid"]) == told["started"]:
            return dict(told)
    except (OSError, ValueError, KeyError, IndexError):
        pass
    raise Trouble("the workload's network is not there any more")


def serve(folder: str) -> int:
    """Make the network and stay with it."""
    with open(os.path.join(folder, "network.json")) as handle:
        told = json.load(handle)
    libc.prctl(PR_SET_NAME, b"novacron-net", 0, 0, 0)
    stop, stopping = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(stopping, b"."))
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    check(libc.unshare(CLONE_NEWNET), "a network namespace")
    inside = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    own, nodes = (f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in (inside, before))
    with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as handle:
        handle.write("1")
    ip("link", "add", BRIDGE, "type", "bridge", "forward_delay", "0", "stp_state", "0")
    ip("link", "set", BRIDGE, "up")
    enter(nodes)  # what the connecting program carries leaves the node as the node's own
    network = Network({**told, "command": [word.replace("NAMESPACE", own) for word in told["command"]]}, os.getpid(), folder)

    def up() -> None:
        enter(own)
        ip("link", "set", UPLINK, "master", BRIDGE, "up")
        enter(nodes)
        assert network._process is not None
        write(os.path.join(folder, "segment.json"), {"pid": os.getpid(), "started": started_ticks(os.getpid()), "namespace": own, "connector": network._process.pid, "connector_started": started_ticks(network._process.pid)})

    network.start()
    try:
        up()
        tell("running")
        selector = selectors.DefaultSelector()
        selector.register(stop, selectors.EVENT_READ)
        selector.register(network.ended, selectors.EVENT_READ, network)
        retry = 0.0
        while True:
            found = [key.fd for key, _ in selector.select(retry or None)]
            if stop in found:
                return 0
            retry = network.tend(selector)
            if not retry:
                up()
    finally:
        network.stop()


def attach(folder: str, port: str, pid: int) -> None:
    """Give the container whose first process is `pid` its interface; the other end is the port `port`, not plugged in.

    Windows are not scaled: the connecting program does not do it, and CRIU (4.2) brings a connection without it back into a kernel that believes it has it, and then offers next to nothing.
    """
    enter(known(folder)["namespace"])
    try:
        ip("link", "del", port)  # of one that was killed: its namespace may not be gone yet
    except Trouble:
        pass
    ip("link", "add", port, "mtu", str(MTU), "type", "veth", "peer", "name", INSIDE, "address", HARDWARE, "mtu", str(MTU), "netns", str(pid))
    ip("link", "set", port, "up")
    enter(f"/proc/{pid}/ns/net")
    with open("/proc/sys/net/ipv4/tcp_window_scaling", "w") as handle:
        handle.write("0")
    ip("link", "set", "lo", "up")
    ip("addr", "add", f"{ADDRESS}/{BITS}", "dev", INSIDE)
    ip("link", "set", INSIDE, "up")
    ip("neigh", "replace", GATEWAY, "lladdr", GATEWAY_HARDWARE, "dev", INSIDE, "nud", "permanent")
    ip("route", "add", "default", "via", GATEWAY)


def tap(name: str) -> int:
    """A port for a guest, in this process's network namespace: a descriptor, with which it goes."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    ip("link", "set", name, "mtu", str(MTU), "up")
    return descriptor


def main() -> int:
    """The holder, or the hook."""
    try:
        if sys.argv[1] == "serve":
            return serve(sys.argv[2])
        if sys.argv[1] == "attach":
            attach(sys.argv[2], sys.argv[3], int(json.load(sys.stdin)["pid"]))
            if sys.argv[4:] == ["plugged"]:
                enter(known(sys.argv[2])["namespace"])
                ip("link", "set", sys.argv[3], "master", BRIDGE)
            return 0
    except (Trouble, OSError, ValueError) as error:
        print(str(error)[:1000], file=sys.stderr)
        if sys.argv[1] == "serve":
            write(os.path.join(sys.argv[2], "failed.json"), {"failed": str(error)[:1000]})
    return 1


if __name__ == "__main__":
    sys.exit(main())
