"""What can go wrong, said once.

Every error that the driver raises on purpose is one of these. `rpc/status.py` turns each class into a gRPC code, and that code
decides whether data leaks: external-provisioner takes only CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE and ABORTED for "may still
be in progress"; every other code means "certainly not done". So a class stands for what the caller may conclude, not for the
place where it was raised.

The messages are read by a cluster admin in `kubectl describe`: they name the thing, its value, and what to do or what is allowed.
This module is the lowest room, so that the kernel side can raise the same errors as the domain.
"""


class TatamiError(Exception):
    """Base of every error raised on purpose. Never raised itself."""


# --- the request is wrong -------------------------------------------------------------------------------------------------------


class InvalidArgument(TatamiError):
    """A field of the request is missing, malformed, unknown, or asks for what this driver does not do."""

    @classmethod
    def field(cls, name: str, value: object, allowed: str) -> "InvalidArgument":
        """Say which field, what it held (shortened, quoted) and what is allowed."""
        return cls(f"{name} is {quoted(value)}: {allowed}")


class OutOfRange(TatamiError):
    """The size asked for cannot be: an impossible range, a shrink, or more than the pool can ever hold."""


class NotFound(TatamiError):
    """No such volume, snapshot, group, source, node or path; also a handle that this driver cannot have given."""


class AlreadyExists(TatamiError):
    """The name or target is taken by something that differs from what is asked for."""


# --- not now, come back -----------------------------------------------------------------------------------------------------------


class OperationPending(TatamiError):
    """Another call works on the same volume, a copy is still running, or a page token is not ours. Retry."""


class LockLost(OperationPending):
    """The server took our lock away (lease expired). What it protected must stop: the lock may be someone else's."""


class DeadlineExceeded(TatamiError):
    """A command or a kernel call ran into its deadline; whether it took effect is not known."""


class Unavailable(TatamiError):
    """The lane is full, the server cannot be reached, or the driver is shutting down. Nothing is known to have changed."""


# --- the state does not allow it --------------------------------------------------------------------------------------------------


class ResourceExhausted(TatamiError):
    """No room: the filesystem, the quota, the pool's promises or the attach limit; or the content lives on another node."""


class FailedPrecondition(TatamiError):
    """In use, published elsewhere, has dependants, not staged, or the volume lacks what is asked of it."""


# --- ours -------------------------------------------------------------------------------------------------------------------------


class RecordDamaged(TatamiError):
    """A record cannot be read as what it should be. INTERNAL, and a health entry; the data is left alone."""


def quoted(value: object, limit: int = 80) -> str:
    """Show a value from a request in a message: quoted, control characters escaped, at most `limit` characters."""
    text = value if isinstance(value, str) else str(value)
    shown = text if len(text) <= limit else text[:limit] + "…"
    return ascii(shown) if not shown.isprintable() else f"'{shown}'"
