"""What `test_deploy` runs in namespaces of its own: a Docker of its own there, the images loaded as firmware_images/README.md says, and compose.yaml brought up by its own first lines. It ends with 0 where all of it holds."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

from firmware_images import containers
from tests.system.steps import until
from tools.bench.harness import ROOT, die_with_parent
from tools.novactl.client import Api

RESTARTS_MAX = 3
"""Of a container on its way up: one that is started more often does not come up."""

DEPLOY = Path(containers.__file__).with_name("deploy")
SERVICES = ("broker", "hub", "edge")
URL = "http://127.0.0.1:8460"

CONFIGS = """    configs: [{source: mosquitto, target: /etc/novacron/mosquitto.conf}]
    volumes: ["broker:/var/lib/novacron"]
"""
"""How compose.yaml had its broker's configuration until somebody had Docker read it."""


def run(*words: str, folder: Path | None = None, code: int = 0) -> str:
    """What a command says; it has to end so."""
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != code:
        raise AssertionError(f"{' '.join(words)}: {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def search_path() -> str:
    """Where programs are looked for: this machine's Docker, or the one that tools/setup/docker.sh has laid out."""
    own, beside = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", str(ROOT / ".novacron/docker/bin")
    return f"{own}:{beside}" if shutil.which("dockerd", path=own) else f"{beside}:{own}"


def compose_words(path: str) -> list[str]:
    """Compose 2, as a plugin or by itself; empty where there is none."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if (program := shutil.which(words[0], path=path)) and re.match(r"v?([2-9]|\d\d+)\.", subprocess.run([program, *words[1:], "version", "--short"], capture_output=True, text=True, check=False).stdout):
            return words
    return []


class Site:
    """The folder of compose.yaml, and what runs of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compose_words = compose_words(os.environ["PATH"])

    def compose(self, *words: str) -> str:
        return run(*self.compose_words, *words, folder=self.folder)

    def container(self, service: str) -> Any:
        """All that Docker says of it."""
        [told] = json.loads(run("docker", "inspect", f"novacron-{service}-1"))
        return told

    def coming(self) -> bool:
        """True; raises once a container is started again and again."""
        for service in SERVICES:
            if self.container(service)["RestartCount"] > RESTARTS_MAX:
                raise AssertionError(f"{service} does not come up: {self.compose('logs', '--no-color', '--tail', '5', service)}")
        return True

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text().strip()

    @property
    def hub(self) -> Api:
        return Api(URL, self.secret("hub_token"))

    def edge(self) -> Any:
        """What the hub knows of the edge while that is there, else nothing."""
        return next((one for one in self.hub.get("/api/v1/edges") if one["edge"] == "edge-1" and one["state"] == "online"), None)

    def telemetry(self) -> int:
        """Records of it that the hub has without a gap, once the edge is there."""
        found = self.edge()
        return int(found["streams"]["telemetry"]["contiguous"]) if found else 0

    def flows(self, what: str) -> int:
        """Wait for the edge and for more of its telemetry than there is."""
        until(f"{what}: the edge is at its hub", lambda: self.coming() and self.edge())
        begun = self.telemetry()
        return int(until(f"{what}: its telemetry comes", lambda: (now := self.telemetry()) > begun and now))

    def python(self, service: str, code: str, user: str = "", fails: bool = False) -> str:
        """Run a line inside a container."""
        return run("docker", "exec", *(["--user", user] if user else []), f"novacron-{service}-1", "/usr/bin/python3", "-c", code, code=int(fails))

    def programs(self, service: str) -> list[Path]:
        """/proc of what runs below a container's first process, which is Docker's init."""
        first = self.container(service)["State"]["Pid"]
        return [Path("/proc", pid) for pid in Path(f"/proc/{first}/task/{first}/children").read_text().split()]


def started(folder: Path) -> "subprocess.Popen[bytes]":
    """A Docker whose all is below `folder` and in this namespace's /run, once it answers."""
    run("mount", "-t", "tmpfs", "run", "/run")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    os.environ["DOCKER_HOST"] = "unix:///run/docker.sock"
    log = (folder / "dockerd.log").open("wb")

    def starts(answers: list[str], *words: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent)

        def look() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"{words[0]} has ended: {process.returncode}")
            return subprocess.run(answers, capture_output=True, check=False).returncode == 0

        until(f"{words[0]} answers", look)
        return process

    # One that Docker starts itself has to answer within fifteen seconds, which an emulated machine does not do.
    settings = folder / "containerd.toml"
    settings.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
    address = "/run/containerd/containerd.sock"
    starts(["test", "-S", address], "containerd", "--config", str(settings), "--root", str(folder / "containerd"), "--state", "/run/containerd", "--address", address)
    return starts(["docker", "info"], "dockerd", "--containerd", address, "--data-root", str(folder / "docker"), "--cgroup-parent", "/novacron-deploy")


def literally(site: Site) -> list[str]:
    """The lines that the file begins with, as somebody types them who is root."""
    lines = [line.removeprefix("#   ") for line in (site.folder / "compose.yaml").read_text().partition("\nname:")[0].splitlines() if line.startswith("#   ")]
    assert lines[-1].startswith("docker compose up -d"), lines
    return [re.sub(r"\bdocker compose\b", " ".join(site.compose_words), line.replace("sudo ", "")) for line in lines]


def main(folder: Path, home: Path, control: str) -> None:
    """All of it. `control`: what is planted."""
    docker = started(folder)
    for name in ("hub", "edge"):
        run("sh", "-c", f"tar -cC {containers.layout(home, containers.service(name), 'production')} . | docker load")
    site = Site(folder / "site")
    os.umask(0o077)  # of somebody who is careful
    shutil.copytree(DEPLOY, site.folder, copy_function=lambda one, other: Path(other).write_bytes(Path(one).read_bytes()))
    file = site.folder / "compose.yaml"
    lines = literally(site)
    if control == "configs":
        text = re.sub(r'    # A file of this folder.*\n    volumes: \["broker.*\n', CONFIGS, file.read_text())
        file.write_text(text + "configs:\n  mosquitto:\n    content: |\n" + "".join(f"      {line}\n" for line in (DEPLOY / "mosquitto.conf").read_text().splitlines()))
    if control == "rights":
        lines = [line for line in lines if not line.startswith("chown")]
    run("bash", "-ec", "\n".join(lines), folder=site.folder)

    until("the hub is ready", lambda: site.coming() and site.hub.get("/readyz")["ready"])
    before = site.flows("first start")

    # What walls them in holds.
    for service, memory in (("broker", 128 << 20), ("hub", 1 << 30), ("edge", 128 << 20)):
        told = site.container(service)["HostConfig"]
        assert (told["Memory"], told["PidsLimit"], told["ReadonlyRootfs"]) == (memory, 128, True), told
        programs = site.programs(service)
        assert programs, service
        for one in programs:
            status = dict(re.findall(r"^(\w+):\s+(.*)$", (one / "status").read_text(), re.MULTILINE))
            assert status["Uid"].split() == status["Gid"].split() == [str(containers.USER)] * 4, status
            assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0 and status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", status
        assert "Read-only file system" in site.python(service, "open('/usr/x', 'w')", fails=True)
        site.python(service, "open('/tmp/x', 'w').write('x'); open('/var/lib/novacron/x', 'w').write('x')")
        for secret in site.container(service)["HostConfig"]["Binds"] or ():
            assert not secret.startswith("/run"), secret
        held = site.python(service, "import os; print(*os.listdir('/run/secrets'))").split()
        assert held, service
        for name in held:
            site.python(service, f"open('/run/secrets/{name}').read()")
            assert "PermissionError" in site.python(service, f"open('/run/secrets/{name}').read()", user="1234:1234", fails=True), name
    print("deploy: the walls hold", flush=True)
    logs = site.compose("logs", "--no-color")
    assert not [name for name in ("hub_token", "edge_token", "edge_password") if site.secret(name) in logs] and "Warning" not in logs, logs[-4000:]

    # Each of them is killed.
    for service in SERVICES:
        count, first = site.container(service)["RestartCount"], site.container(service)["State"]["Pid"]
        for one in site.programs(service):
            os.kill(int(one.name), 9)
        until(f"{service} is started again", lambda: (now := site.container(service))["RestartCount"] > count and now["State"]["Running"] and now["State"]["Pid"] != first)  # noqa: B023
        site.flows(f"{service} killed")

    # A broker that is away is no reason to start the hub anew.
    site.compose("stop", "broker")
    until("the hub misses its broker", lambda: not site.hub.get("/readyz")["ready"])
    assert site.hub.get("/livez")["status"] == "ok"
    site.compose("start", "broker")
    site.flows("broker stopped and started")

    # All ends in order, within the time that it is given: else it would be killed (137). The next ones have the same data.
    site.compose("stop")
    assert {service: site.container(service)["State"]["ExitCode"] for service in SERVICES} == dict.fromkeys(SERVICES, 0)
    site.compose("down")
    assert not run("docker", "ps", "-aq").split()
    site.compose("up", "-d")
    assert site.flows("down and up") > before
    boots = [one["body"]["boot_n"] for one in site.hub.get("/api/v1/edges/edge-1/records?stream=event&limit=100") if one["kind"] == "boot"]
    assert boots == [1, 2, 3], "it is the same edge with the same journal, and the same hub"
    os.environ["NOVACRON_TOKEN"] = site.secret("hub_token")
    proof = run(sys.executable, "-m", "tools.novactl", "verify", "--hub", URL, folder=ROOT)
    assert proof.count("exact") == 3, proof
    print(f"deploy: nothing is lost\n{proof}", flush=True)
    site.compose("down", "-v")
    docker.terminate()
    docker.wait(60)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except (Exception, urllib.error.URLError):
        print((Path(sys.argv[1]) / "dockerd.log").read_text(errors="replace")[-2000:])
        raise
