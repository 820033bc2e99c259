"""What can go wrong, by kind. The source is never harmed, and the destination is whole or absent, whichever of these is raised."""


class MigrationError(Exception):
    """The base of all; the text names the cause and the remedy."""


class FormatError(MigrationError):
    """An extent or a message does not follow the format: truncated, forged, of another version."""


class HashMismatch(MigrationError):
    """The bytes that came out are not those that went in."""


class BaseMismatch(MigrationError):
    """An extent refers to a base, and the base at this end is absent or is not what it says."""


class KeyRefused(MigrationError):
    """A key is missing, too short or readable by others; or the other end has another one."""


class Unauthentic(MigrationError):
    """A record was forged, changed, reordered or replayed."""


class DestinationError(MigrationError):
    """The destination cannot take the object: no space, it is there already, it cannot be written."""


class SourceError(MigrationError):
    """The source cannot be read, or it changes and no way of pausing it was given."""


class TransferLost(MigrationError):
    """The other end could not be reached for longer than the patience given."""


class Refused(MigrationError):
    """The other end refused, and says why."""


class PauseFailed(MigrationError):
    """The writer of the source could not be paused or resumed."""


class NotConverged(MigrationError):
    """The source changes faster than it can be moved within the downtime allowed."""

    def __init__(self, text: str, reason: str) -> None:
        """`reason`: a convergence.Reason."""
        super().__init__(text)
        self.reason = reason


class Undecided(MigrationError):
    """The destination was asked to commit and its answer is not known: the writer stays paused, so that never both ends go on."""


class DeviceFailed(MigrationError):
    """A GPU cannot be used, went away or gave something wrong; the processors can do the same work."""


class DeviceFull(DeviceFailed):
    """The GPU, or the host, has no memory left for what was asked."""


class ModelError(MigrationError):
    """A model of predictions, or the history that calibrates it, cannot be read."""
