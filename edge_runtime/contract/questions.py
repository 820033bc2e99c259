"""Questions of the hub to an edge about a workload that is there, and their answers in pieces. They are no part of what is kept: a question that gets lost is asked again, and nobody stores an answer."""

from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ContractError
from .limits import PROTOCOL_VERSION
from .schema import VERSION, Field, Message
from .topics import EDGE_ANSWER, EDGE_ASK

LOGS, EXEC = KINDS = ("logs", "exec")
"""The end of what a workload has written, or what came since; a command in it."""

STREAMS = ("stdout", "stderr")

MAX_OUTPUT = 262_144
"""Bytes of one stream in one answer."""

PIECE = 98_304
"""Bytes of one piece: as base64 with its frame it is half of what one message may have."""

MAX_PIECES = 2 * -(-MAX_OUTPUT // PIECE) + 1
"""Pieces of one answer: both streams, and the last one, which says what there is to say of it all."""

MAX_ARGS, MAX_ARG_CHARS = 64, 8_192
"""Words of a command, and characters of one: a script of some hundred lines."""

MAX_EXEC_S = 60.0
"""Seconds that a command may take: somebody waits for it."""

_ENCODED = -(-PIECE // 3) * 4


def _check_args(message: dict[str, Any]) -> None:
    for index, word in enumerate(message["args"]):
        if not isinstance(word, str) or len(word) > MAX_ARG_CHARS or "\0" in word:
            raise ContractError(f"args[{index}]", f"is no text of up to {MAX_ARG_CHARS} characters without a zero", "shorten the command", "type")
    if message["kind"] == EXEC and not message["args"]:
        raise ContractError("args", "are empty", "give a command", "missing")


QUESTION = Message(
    name="question",
    topic=EDGE_ASK,
    direction="hub to edge",
    retained=False,
    doc="Asks about a workload that is there. Answered once, and only before it expires.",
    fields=(
        VERSION,
        Field("edge", "id", "the edge's name"),
        Field("id", "id", "the question's name, unique"),
        Field("hub", "id", "who asks"),
        Field("kind", "enum", "what is asked", choices=KINDS),
        Field("workload", "id", "about which workload; its newest placement there counts"),
        Field("bytes", "integer", "logs: of each stream at most so many", required=False, default=MAX_OUTPUT, minimum=1, maximum=MAX_OUTPUT),
        Field("since", "string", "logs: only what came after this, an earlier answer's `since`; empty: the end", required=False, default="", max_items=128),
        Field("args", "array", "exec: the command and its arguments", required=False, default=[], max_items=MAX_ARGS),
        Field("timeout_s", "number", "exec: it is killed after so many seconds", required=False, default=10.0, minimum=0, maximum=int(MAX_EXEC_S)),
        Field("expires_ms", "integer", "wall time after which nobody waits for the answer, milliseconds since 1970 UTC", minimum=0),
    ),
    after=_check_args,
    example={
        "v": 1, "edge": "gw-1", "id": "q-5f2a", "hub": "hub", "kind": "logs", "workload": "camera-7", "bytes": 8192, "since": "", "args": [], "timeout_s": 10.0, "expires_ms": 1795500015000,
    },
)

ANSWER = Message(
    name="answer",
    topic=EDGE_ANSWER,
    direction="edge to hub",
    retained=False,
    doc="One piece of an answer; they come in order. The last one has no data and says what there is to say of it all.",
    fields=(
        VERSION,
        Field("edge", "id", "the edge's name"),
        Field("id", "id", "the question that is answered"),
        Field("part", "integer", "the number of the piece, from 0", minimum=0, maximum=MAX_PIECES - 1),
        Field("stream", "enum", "of which stream this is a piece", required=False, default="stdout", choices=STREAMS),
        Field("data", "string", "the bytes, as base64", required=False, default="", max_items=_ENCODED),
        Field("last", "boolean", "this is the last piece", required=False, default=False),
        Field("detail", "object", "of the last piece: epoch, phase, reason, cut (there was more), since (logs: ask with it for what comes next), code (exec); or field, problem, remedy where it was refused", required=False, default={}, max_items=16),
    ),
    example={"v": 1, "edge": "gw-1", "id": "q-5f2a", "part": 1, "stream": "stdout", "data": "", "last": True, "detail": {"epoch": 3, "phase": "running", "cut": False, "since": "1205:96:3421780262/0:0:0"}},
)


def pieces(edge: str, question: str, output: Mapping[str, bytes], detail: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """An answer as messages; of each stream the last `MAX_OUTPUT` bytes."""
    import base64

    part = 0
    for stream in STREAMS:
        data = output.get(stream, b"")[-MAX_OUTPUT:]
        for at in range(0, len(data), PIECE):
            yield {"v": PROTOCOL_VERSION, "edge": edge, "id": question, "part": part, "stream": stream, "data": base64.b64encode(data[at:at + PIECE]).decode(), "last": False, "detail": {}}
            part += 1
    yield {"v": PROTOCOL_VERSION, "edge": edge, "id": question, "part": part, "stream": "stdout", "data": "", "last": True, "detail": dict(detail)}


class Collected:
    """An answer that is coming; whose pieces nobody vouches for."""

    def __init__(self) -> None:
        self._next = 0
        self._streams: dict[str, bytearray] = {stream: bytearray() for stream in STREAMS}
        self.detail: dict[str, Any] | None = None
        """What the last piece says; None before it has come."""

    def take(self, piece: Mapping[str, Any]) -> None:
        """The next piece, as `ANSWER` has it; one that was sent twice is passed over. Raises `ContractError` for what does not follow."""
        import base64
        import binascii

        if piece["part"] < self._next:
            return
        if piece["part"] > self._next:
            raise ContractError("part", f"{piece['part']} does not follow {self._next - 1}", "send pieces in order", "order")
        try:
            data = base64.b64decode(piece["data"], validate=True)
        except (binascii.Error, ValueError):
            raise ContractError("data", "is not base64", "encode the bytes as base64", "type") from None
        kept = self._streams[piece["stream"]]
        if len(kept) + len(data) > MAX_OUTPUT:
            raise ContractError("data", f"more than {MAX_OUTPUT} bytes of one stream", "send less", "limit")
        kept += data
        self._next += 1
        if piece["last"]:
            self.detail = dict(piece["detail"])

    def output(self, stream: str) -> bytes:
        """What has come of a stream."""
        return bytes(self._streams[stream])
