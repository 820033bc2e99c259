"""Limits that both sides keep. Each has a unit and a reason; a message over a limit is refused, counted and named."""

PROTOCOL_VERSION = 1
"""Major version of the contract; part of every topic and, as `v`, of every message."""

MAX_MESSAGE_BYTES = 262_144
"""Bytes of one MQTT payload. AWS IoT Core takes 128 KiB, Azure and most brokers 256 KiB; batches stay under half of this."""

BROKER_PACKET_BYTES = 300_000
"""Bytes of an MQTT packet that a broker should take: the largest payload, and what is around it. Edges do with less (`uplink.room`), down to their largest record."""

MAX_DEPTH = 16
"""Nesting of objects and arrays in one message: deeper ones are a mistake or an attack on the parser."""

MAX_ID_CHARS = 64
"""Characters of an edge, device, rule or stream name: fits every broker's topic and client-id limits (23 is MQTT 3.1 only)."""

MAX_BODY_BYTES = 65_536
"""Bytes of one record's body as canonical JSON: two fit a batch whatever happens."""

MAX_BATCH_RECORDS = 500
"""Records of one batch: bounds what one message can make the hub do in one transaction."""

MAX_METRICS = 64
"""Values of one reading."""

MAX_READINGS_PER_MESSAGE = 100
"""Readings in one device message (an array): bounds the work one message can cause."""

MAX_STRING_CHARS = 1024
"""Characters of a text value in a reading."""

MAX_WANT_RANGES = 32
"""Ranges a hub may ask for again in one receipt; the rest is asked for next time."""

MAX_COMMANDS = 256
"""Commands that wait in one desired state."""

MAX_RULES = 256
"""Rules in one desired state."""

MAX_MODELS = 16
"""Models in one desired state."""

MAX_TWINS = 1024
"""Devices with desired twin state in one desired state."""

MAX_SITE_DEVICES = 1_000
"""Devices that the members of one site share: the table with the longest names and numbers is 230 KB, one message."""

MAX_SITE_MEMBERS = 64
"""Members of one site: each hears every other once a second."""

MAX_DUTY_PATTERNS = 32
"""Patterns of devices that have their home at one member."""

MAX_DUTY_BYTES = 65_536
"""Bytes of one hand-over state: the latches of one device and, where it fits, its twin. Every member keeps that of every device."""

MAX_SITE_NUMBER = 2**53 - 1
"""Largest number of a site's table: what every JSON reader holds exactly."""

MAX_SITE_WORKLOADS = 128
"""Workloads that a site's table says the holder of: with the most devices and the longest names it is still one message."""

MAX_SHARED_WORKLOADS = 32
"""Workloads of one member that siblings may take over; one more is refused, so that the hub places it elsewhere."""

MAX_WORKLOADS = 256
"""Workloads in one desired state, those that shall stop included: what one machine's agent watches (kube's default is 110 per node); a kibibyte each where all are there."""

MAX_WORKLOAD_BYTES = 16_384
"""Bytes of one workload's document: sixteen of them fit a desired state at the least, and none is a disk image by mistake."""

MAX_OPERATIONS = 64
"""Operations on workloads in one desired state: they are asked for by people, and go when they have ended or expired."""

MAX_CHECKPOINTS = 64
"""Checkpoints that one node keeps: what it tells of them is one record."""

MAX_SNAPSHOTS = 64
"""Snapshots that one node keeps: as of checkpoints."""

MAX_INTEGER = 2**63 - 1
"""Largest magnitude of an integer: what SQLite and PostgreSQL store exactly."""
