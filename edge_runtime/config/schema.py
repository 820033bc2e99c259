"""Every key of the edge's configuration: type, unit, default, meaning. The page docs/edge-config.md is generated from here.

Attribute names end with their unit: `_s` seconds (YAML takes 250ms, 10s, 5m, 2h or a number of seconds), `_bytes` bytes (YAML takes
64MiB, 1GB or a number). In YAML the unit may be left off: `keepalive: 15s` is `keepalive_s: 15`.
"""

from typing import Any

from ..contract.lean_dataclass import dataclass, field


def key(default: Any, doc: str, *, factory: bool = False, secret: bool = False, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None) -> Any:
    """One key with its one-line meaning and limits."""
    metadata = {"doc": doc, "secret": secret, "choices": choices, "low": low, "high": high}
    if factory:
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class UplinkConfig:
    """The link to the hub."""

    enabled: bool = key(True, "connect to a hub; false: this edge works alone")
    url: str = key("mqtt://127.0.0.1:1883", "the hub's broker, mqtt://host:port or mqtts://host:port")
    username: str = key("", "user name at the broker")
    password: str = key("", "password at the broker", secret=True)
    password_file: str = key("", "or the file with it, read at each connection")
    ca_file: str = key("", "certificate authorities to trust (PEM); empty: the system's")
    cert_file: str = key("", "this edge's certificate (PEM)")
    key_file: str = key("", "its private key (PEM)")
    protocol: str = key("auto", "MQTT version; auto tries 5 and falls back", choices=("auto", "5", "3.1.1"))
    keepalive_s: float = key(15.0, "keep-alive; a dead link is noticed after 1.5 times this", low=2, high=3600)
    backoff_base_s: float = key(1.0, "bound of the first pause between tries", low=0.01, high=3600)
    backoff_cap_s: float = key(60.0, "largest pause between tries", low=0.01, high=86400)
    stable_after_s: float = key(60.0, "how long a link must stay up before the pauses begin anew", low=0, high=86400)
    inflight: int = key(8, "messages on their way to the broker at once", low=1, high=100)
    batch_records: int = key(200, "records in one message at most", low=1, high=500)
    batch_bytes: int = key(131_072, "bytes of one message at most", low=4096, high=200_000)


@dataclass(frozen=True, slots=True)
class BusConfig:
    """The local broker where devices speak."""

    enabled: bool = key(True, "listen to devices on the local bus")
    url: str = key("", "the local broker, mqtt://host:port or mqtts://host:port; empty: no bus")
    username: str = key("", "user name at the local broker")
    password: str = key("", "password at the local broker", secret=True)
    password_file: str = key("", "or the file with it, read at each connection")
    ca_file: str = key("", "certificate authorities to trust (PEM); empty: the system's")
    cert_file: str = key("", "this edge's certificate there (PEM)")
    key_file: str = key("", "its private key (PEM)")
    protocol: str = key("auto", "MQTT version; auto tries 5 and falls back", choices=("auto", "5", "3.1.1"))
    keepalive_s: float = key(15.0, "keep-alive", low=2, high=3600)
    inflight_max: int = key(200, "device messages taken in and not yet durable, at once (MQTT 5)", low=1, high=10_000)


@dataclass(frozen=True, slots=True)
class JournalConfig:
    """What is kept, how much of it and how soon it is on the disk."""

    commit_interval_s: float = key(0.0, "least time between two commits of decisions and events; 0: as soon as the last one is done", low=0, high=10)
    telemetry_commit_interval_s: float = key(0.5, "least time between two commits of telemetry that nobody waits for", low=0, high=60)
    max_bytes: int = key(1 << 30, "size of the journal of decisions and events at which the oldest go", low=1 << 20, high=1 << 40)
    telemetry_max_bytes: int = key(4 << 30, "size of the telemetry at which the oldest goes", low=1 << 20, high=1 << 40)
    retain_receipted_records: int = key(10_000, "records per stream kept for explain after the hub has them", low=0, high=10_000_000)
    min_free_bytes: int = key(64 << 20, "free space that is left on the file system; telemetry is cut below it", low=0, high=1 << 40)
    ballast_bytes: int = key(8 << 20, "space set aside and released when the disk is full", low=0, high=1 << 30)
    target_hours: float = key(72.0, "hours of outage that must fit; an alarm is raised below", low=0, high=10_000)
    pending_max: int = key(20_000, "records that wait for the disk at most", low=100, high=1_000_000)


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The host itself as a device."""

    enabled: bool = key(True, "sample this host")
    interval_s: float = key(1.0, "time between two samples", low=0.05, high=86400)
    device_id: str = key("host", "the host's name as a device")


@dataclass(frozen=True, slots=True)
class DevicesConfig:
    """Devices behind this edge."""

    auto_register: bool = key(True, "a device's first reading registers it")
    registry_max: int = key(1000, "registered devices at most", low=1, high=100_000)
    early_max_devices: int = key(256, "unregistered devices whose readings are kept", low=0, high=10_000)
    early_max_readings: int = key(64, "readings kept per unregistered device", low=1, high=10_000)
    early_ttl_s: float = key(600.0, "how long they are kept", low=0, high=86400)
    host: HostConfig = key(HostConfig, "", factory=True)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model of this edge's own."""

    manifest: str = key("", "path of the model's manifest; `shipped:NAME/FORMAT` for one that comes with the agent")
    name: str = key("", "the name rules use; empty: the manifest's")
    data: str = key("", "path of the model's data; empty: beside the manifest")


@dataclass(frozen=True, slots=True)
class DutiesConfig:
    """Sharing the devices of the local bus with the other edges of this site (see docs/site.md)."""

    enabled: bool = key(False, "share the devices of the local bus with the other edges of this site, and stand in for each other; every edge on that bus must")
    home: tuple[str, ...] = key((), "patterns of the devices that have their home here (`*` and `?` match): served here while this edge lives, and by its rules")
    capacity: float = key(1.0, "how much this edge can take on, compared with the others; 0 takes on nothing that another can", low=0, high=1_000_000)


@dataclass(frozen=True, slots=True)
class DecisionsConfig:
    """What this edge decides by before a hub says otherwise."""

    rules: tuple[dict[str, Any], ...] = key((), "rules (see docs/rules.md)")
    rules_file: str = key("", "a JSON file with more rules")
    models: tuple[ModelConfig, ...] = key((), "models that rules may ask")


@dataclass(frozen=True, slots=True)
class WorkloadsConfig:
    """What this node offers to the hub's scheduler."""

    enabled: bool = key(False, "tell the hub what this node has, and take workloads")
    kind: str = key("edge", "what the node is; edge and hybrid keep their workloads while the hub does not hear of them", choices=("edge", "hybrid", "cloud", "gpu", "storage"))
    reserve_cpu_milli: int = key(250, "thousandths of a processor that workloads do not get", low=0, high=1_000_000)
    reserve_memory_bytes: int = key(512 << 20, "memory that workloads do not get", low=0, high=1 << 46)
    reserve_disk_bytes: int = key(5 << 30, "free space of the data folder's file system that workloads do not get", low=0, high=1 << 50)
    max_workloads: int = key(110, "workloads at one time", low=0, high=256)
    interval_s: float = key(60.0, "time between two looks at what the node has", low=1, high=86400)
    runtimes: tuple[str, ...] = key(("runc", "crun"), "what runs containers, the first one that passes the probe is taken: programs, or containerd (see docs/workloads.md); none: containers are refused")
    containerd: str = key("/run/containerd/containerd.sock", "containerd's socket, where runtimes names containerd, or Kata's shim is installed")
    rootless: bool = key(False, "where the agent is not root: run it in a user namespace of its own, so that it can run containers (see docs/workloads.md); the driver says why not, where that cannot be had")
    criu: str = key("criu", "the program that takes checkpoints of containers (CRIU 4.2 or later), by its name on PATH or its path; empty: none are taken")
    microvms: bool = key(False, "run containers and batch jobs with isolation microvm: boots a guest when the agent starts, and keeps 130 MB of memory for its clones")
    conversions: bool = key(False, "take workloads that can become a micro-VM while they run (spec.converts); needs runc, CRIU, and what guests need; boots a guest when the agent first starts with it")
    vms: bool = key(False, "run virtual machines: boots a guest when the agent starts, to see whether it can")
    guest_kernel: str = key("", "folder with boot/ and lib/modules/ of the kernel that guests boot; empty: this machine's own")
    functions: bool = key(True, "run functions and batch jobs that are WebAssembly, where wasmtime is installed")
    images_bytes: int = key(8 << 30, "disk space for images, checkpoints and snapshots; images that nothing stands on go beyond it", low=0, high=1 << 50)
    fetch: bool = key(True, "fetch images that are not on this node from the registry that their name says; false: only what is in the archives folder is taken")
    registries: tuple[dict[str, Any], ...] = key((), "registries: host, mirrors (hosts that are asked first), insecure (plain HTTP), ca_file (PEM), short (names without a registry mean this one)")
    registry_credentials: str = key("", "file with credentials for registries, as docker login writes it; its mode must be 0600")
    evict_memory_bytes: int = key(100 << 20, "with less memory available than this, workloads are ended, the least priority first; 0: never", low=0, high=1 << 46)
    evict_disk_bytes: int = key(1 << 30, "the same of free space of the data folder's file system; images that nothing stands on go before", low=0, high=1 << 50)
    mounts: tuple[str, ...] = key((), "folders of this node that containers may mount, with all below them")
    moves_hub: str = key("", "address of the hub's API (https://...), by which this node's migration worker fetches and sends the states of containers that move; empty: none move with their state")
    moves_token_file: str = key("", "file with the token that the hub has for this node's migration worker, mode 0600")
    moves_ca_file: str = key("", "certificate authorities by which that address is trusted (PEM); empty: the system's")
    moves_listen: str = key("127.0.0.1", "address on which states are received")
    moves_advertise: str = key("", "how other nodes reach that address, where that is another name")
    exec: bool = key(False, "let the hub run commands in workloads (novactl exec); each is an event record")
    network: bool = key(True, "let containers that ask for it have this node's network, where slirp4netns is installed")
    publish: tuple[str, ...] = key(("127.0.0.1",), "IPv4 addresses of this node on which containers may publish ports; 0.0.0.0 allows all, none allows none")
    bridges: tuple[str, ...] = key((), "bridges of this node to which virtual machines may be connected (spec.network.tap); the operator makes them")
    taints: tuple[dict[str, Any], ...] = key((), "taints: key, value, effect (NoSchedule, PreferNoSchedule, NoExecute)")


@dataclass(frozen=True, slots=True)
class UpdatesConfig:
    """Updates of the image that this edge runs from (see firmware_images/README.md); an image turns them on by itself."""

    enabled: bool = key(False, "take orders for updates; only where the image's updater runs beside the agent")
    status_file: str = key("/var/lib/novacron/updates/status.json", "where the updater says how the update stands")
    ca_file: str = key("", "certificate authorities by which an order's https:// address is trusted (PEM); empty: the system's")


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """The local HTTP API."""

    enabled: bool = key(True, "serve /healthz, /readyz, /metrics and /api/v1; false is the lean profile")
    host: str = key("127.0.0.1", "address to listen on")
    port: int = key(8470, "port to listen on; 0 takes a free one", low=0, high=65535)
    token_file: str = key("", "file with the token that /api/v1 asks for; empty: none, then only loopback is allowed")


@dataclass(frozen=True, slots=True)
class LoggingConfig:
    """What is logged, to standard error."""

    level: str = key("info", "least level", choices=("debug", "info", "warning", "error"))
    format: str = key("text", "text or one JSON object per line", choices=("text", "json"))


@dataclass(frozen=True, slots=True)
class EdgeConfig:
    """The configuration of one edge."""

    edge_id: str = key("", "this edge's name; empty: what the host was called when the data folder was first used")
    region: str = key("", "the region it stands in")
    site: str = key("default", "the site it belongs to")
    node: str = key("", "the node it runs on; empty: the edge's name")
    labels: dict[str, str] = key(dict, "labels, text to text", factory=True)
    data_dir: str = key("", "where the journal and the models are; empty: $STATE_DIRECTORY, else ~/.local/share/novacron/edge")
    nice: int = key(-10, "priority of the agent (nice value) where the system allows it: other programs of this host do not hold a decision up; 0 leaves it", low=-20, high=19)
    uplink: UplinkConfig = key(UplinkConfig, "", factory=True)
    bus: BusConfig = key(BusConfig, "", factory=True)
    journal: JournalConfig = key(JournalConfig, "", factory=True)
    devices: DevicesConfig = key(DevicesConfig, "", factory=True)
    decisions: DecisionsConfig = key(DecisionsConfig, "", factory=True)
    duties: DutiesConfig = key(DutiesConfig, "", factory=True)
    workloads: WorkloadsConfig = key(WorkloadsConfig, "", factory=True)
    updates: UpdatesConfig = key(UpdatesConfig, "", factory=True)
    api: ApiConfig = key(ApiConfig, "", factory=True)
    logging: LoggingConfig = key(LoggingConfig, "", factory=True)
