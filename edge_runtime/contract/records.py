"""Records and batches: what goes up. The chain over records is what `verify` compares."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from . import jsoncodec
from .errors import ContractError
from .lean_dataclass import dataclass
from .limits import MAX_BATCH_RECORDS, MAX_BODY_BYTES, MAX_INTEGER, PROTOCOL_VERSION
from .schema import VERSION, Field, Message
from .streams import STREAMS
from .topics import EDGE_UP

CHAIN_BYTES = 16
"""Bytes of a chain value: 128 bits, enough that two contents never share one by chance."""

CHAIN_START = bytes(CHAIN_BYTES)
"""The chain before the first record of a stream."""

TIME_QUALITIES = ("unsynced", "rtc", "ntp")
"""What wall time is worth: a floor plus elapsed time; a clock that was never checked; a synchronised clock."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `body` is canonical JSON text, so it is encoded once and stored and sent as it is.

    Units: `mono_ms` milliseconds of CLOCK_BOOTTIME, `wall_ms` milliseconds since 1970 UTC.
    """

    seq: int
    boot: str
    mono_ms: int
    wall_ms: int
    quality: str
    kind: str
    body: str

    def chain(self, previous: bytes) -> bytes:
        """blake2b-128 over the previous chain and this record's canonical text."""
        text = f"{self.seq},{self.boot},{self.mono_ms},{self.wall_ms},{self.quality},{self.kind},{self.body}"
        return hashlib.blake2b(previous + text.encode(), digest_size=CHAIN_BYTES).digest()

    def to_wire(self) -> str:
        """JSON text of the record inside a batch."""
        return (
            f'{{"seq":{self.seq},"boot":"{self.boot}","mono":{self.mono_ms},"wall":{self.wall_ms},'
            f'"tq":"{self.quality}","kind":"{self.kind}","body":{self.body}}}'
        )


def chain_over(records: Iterable[Record], start: bytes) -> bytes:
    """The chain after `records`, starting from `start`."""
    value = start
    for record in records:
        value = record.chain(value)
    return value


_RECORD_FIELDS = (
    Field("seq", "integer", "the sequence number, from 1, without gaps per edge and stream", minimum=1),
    Field("boot", "id", "the boot that wrote the record"),
    Field("mono", "integer", "milliseconds of the edge's monotonic clock at append", minimum=0),
    Field("wall", "integer", "milliseconds since 1970 UTC as the edge believed them", minimum=0),
    Field("tq", "enum", "the quality of that wall time", choices=TIME_QUALITIES),
    Field("kind", "id", "what the body is: reading, decision, boot, desired.applied, ..."),
    Field("body", "object", "the record's content; its fields depend on `kind`", max_items=4096),
)


def _check_batch(batch: dict[str, Any]) -> None:
    previous = 0
    for index, record in enumerate(batch["records"]):
        if record["seq"] <= previous:
            raise ContractError(f"records[{index}].seq", f"{record['seq']} does not follow {previous}", "send records in order", "order")
        previous = record["seq"]


BATCH = Message(
    name="batch",
    topic=EDGE_UP,
    direction="edge to hub",
    retained=False,
    doc="Consecutive records of one stream. Sent again until a receipt covers them; the hub drops what it has by (edge, stream, seq).",
    fields=(
        VERSION,
        Field("edge", "id", "the edge's name, the same as in the topic"),
        Field("boot", "id", "the boot that sends"),
        Field("boot_n", "integer", "the number of that boot in this edge's life, from 1", minimum=1),
        Field("stream", "enum", "the stream", choices=tuple(STREAMS)),
        Field("lane", "enum", "live, or history sent after an outage", choices=("live", "history")),
        Field("floor", "integer", "the first seq that the edge still has; what is below and unknown to the hub is gone", minimum=1),
        Field("floor_chain", "hex", "the chain before `floor`"),
        Field("dropped", "integer", "records of this stream the edge dropped unreceipted, ever", minimum=0),
        Field("live", "integer", "what is at or above this seq is sent by the live lane", minimum=1),
        Field("history", "integer", "history below this seq has been sent at least once", minimum=1),
        Field("next", "integer", "the seq the edge will give next", minimum=1),
        Field("records", "array", "the records, in order", max_items=MAX_BATCH_RECORDS, items=_RECORD_FIELDS),
        Field("chain", "hex", "the edge's chain after the last record of this batch, empty where there is none", required=False, default=""),
    ),
    after=_check_batch,
    example={
        "v": 1, "edge": "gw-1", "boot": "6f1c0a9e2b7d4c55", "boot_n": 12, "stream": "decision", "lane": "live", "floor": 1,
        "floor_chain": "00000000000000000000000000000000", "dropped": 0, "live": 120, "history": 120, "next": 122,
        "records": [{
            "seq": 121, "boot": "6f1c0a9e2b7d4c55", "mono": 8123456, "wall": 1795500000000, "tq": "ntp", "kind": "decision",
            "body": {"rule": "overheat", "device": "boiler-1", "outcome": "fired"},
        }],
        "chain": "5e0c2d9a52a3c1f3a8f4b6f07c9d1e22",
    },
)


@dataclass(frozen=True, slots=True)
class Batch:
    """A validated batch at the hub; `records` are in ascending seq."""

    edge: str
    boot: str
    boot_n: int
    stream: str
    lane: str
    floor: int
    floor_chain: bytes
    dropped: int
    live: int
    history: int
    next_seq: int
    records: tuple[Record, ...]
    chain: bytes


def parse_batch(value: Any, edge: str) -> Batch:
    """A decoded payload from the topic of `edge` as a `Batch`.

    Raises:
        ContractError: a field that does not fit, or an edge name that is not the topic's.
    """
    data = BATCH.parse(value)
    if data["edge"] != edge:
        raise ContractError("edge", f"{data['edge']!r} published on the topic of {edge!r}", "publish on the edge's own topic", "topic")
    records = []
    for index, item in enumerate(data["records"]):
        body = jsoncodec.encode(item["body"])
        if len(body) > MAX_BODY_BYTES:
            raise ContractError(f"records[{index}].body", f"{len(body)} bytes are over {MAX_BODY_BYTES}", "split the record", "size")
        records.append(Record(item["seq"], item["boot"], item["mono"], item["wall"], item["tq"], item["kind"], body))
    return Batch(
        edge, data["boot"], data["boot_n"], data["stream"], data["lane"], data["floor"], _chain_value(data["floor_chain"], "floor_chain"),
        data["dropped"], data["live"], data["history"], data["next"], tuple(records), _chain_value(data["chain"], "chain") if data["chain"] else b"",
    )


def _chain_value(text: str, field: str) -> bytes:
    if len(text) != 2 * CHAIN_BYTES:
        raise ContractError(field, f"{len(text)} digits, not {2 * CHAIN_BYTES}", "send the chain as hexadecimal", "type")
    return bytes.fromhex(text)


def encode_batch(
    *, edge: str, boot: str, boot_n: int, stream: str, lane: str, floor: int, floor_chain: bytes, dropped: int, live: int, history: int,
    next_seq: int, records: Sequence[Record], chain: bytes,
) -> bytes:
    """A batch as payload; record bodies are already JSON text and are not encoded again."""
    inner = ",".join(record.to_wire() for record in records)
    return (
        f'{{"v":{PROTOCOL_VERSION},"edge":"{edge}","boot":"{boot}","boot_n":{boot_n},"stream":"{stream}","lane":"{lane}","floor":{floor},'
        f'"floor_chain":"{floor_chain.hex()}","dropped":{dropped},"live":{live},"history":{history},"next":{next_seq},"records":[{inner}],'
        f'"chain":"{chain.hex()}"}}'
    ).encode()


RECORD_KINDS: dict[str, tuple[str, str]] = {
    "reading": ("telemetry", "device, values {metric: value}, device_ms (the device's own time, where it sent one)"),
    "decision": ("decision", "rule, device, outcome (fired, cleared), inputs, actions, generation, offline; on a shared site also fence, and for (the edge that is stood in for)"),
    "boot": ("event", "agent, boot_n, clean (the last stop was orderly), recovered (a database that was rebuilt)"),
    "provisioned": ("event", "what an image's start made of what its device was given: what (configuration, broker), outcome (taken, refused), reason; at each start of the agent until the next of the device"),
    "shutdown": ("event", "reason"),
    "link.up": ("event", "outage_ms, decided_offline"),
    "link.down": ("event", "reason"),
    "desired.applied": ("event", "generation"),
    "desired.rejected": ("event", "generation, field, problem, remedy"),
    "device.registered": ("event", "device, kind, name, early (readings kept before registration)"),
    "twin.reported": ("event", "device, reported, version"),
    "alert": ("event", "rule, device, severity, text, decision"),
    "site": ("event", "what (elected, taken, released, held back), number, duties (device, origin, fence, from or to), workloads likewise, or rules that cannot move and why"),
    "operation": ("event", "an operation's new state: see operations"),
    "lost": ("any", "nothing: this seq may have been used before a damaged journal was rebuilt"),
    "storage": ("event", "what was trimmed or refused, and why"),
    "node.capacity": ("event", "what this node has for workloads: kind, capacity {cpu, memory, disk, ...}, gpus, numa, labels, taints, images, runs [workload kinds]"),
    "workload": ("event", "id, epoch, state (accepted, running, checkpointed, refused, stopped, done, failed), reason; with running also load_ms, where the start was measured; where a site that was cut off gave it to this node, for (the node that had it) and fence"),
    "workload.restart": ("event", "what had ended is started again: id, epoch, tries (restarts in a row), reason (how it had ended)"),
    "workload.evicted": ("event", "a workload is ended since this node is short of memory or disk: id, epoch, what, free and limit (bytes), priority, used and requested (bytes)"),
    "workload.disk": ("event", "a container is ended since it has more on the disk than it asked for: id, epoch, used and limit (bytes)"),
    "workload.exec": ("event", "a command that the hub had run in a workload: id, epoch, question, hub, args (the first kibibyte), state (begun, ended, failed), code, reason"),
    "workload.checkpoints": ("event", "the checkpoints of workloads that are kept here, when that has changed: checkpoints [{workload, epoch, name, taken_ms, bytes (on the disk), root (the hash over all of it)}]"),
    "workload.snapshots": ("event", "the snapshots of workloads that are kept here, when that has changed: snapshots [{workload, epoch, name, taken_ms, bytes (on the disk), digest (of the image that it is), image (the name of that), file}]"),
    "image.pull": ("event", "an image was fetched: image, digest, registry (or mirror), bytes (over the network), blobs, resumed_bytes (what an earlier try had left), cuts (tries that failed), ms"),
    "workload.driver": ("event", "what a driver's probe found: driver, kind, usable, runtime, arch, cgroup, kernel, can [abilities], cannot {ability: reason}"),
    "model": ("event", "name, sha256, outcome (activated, refused), and the reason"),
}
"""Every record kind of this version: its stream and its body's fields. Unknown kinds are stored as they are."""


def max_seq(value: int) -> int:
    """`value` if a sequence number can still grow past it."""
    if value >= MAX_INTEGER:
        raise ContractError("seq", "sequence numbers are used up", "start the edge under a new name", "limit")
    return value
