"""The one table from errors to gRPC codes.

The code decides whether data leaks. external-provisioner and the kubelet take CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE and ABORTED
for "it may have happened, ask again" and every other code for "it certainly has not": the volume is forgotten, and what was made of
it leaks. So whatever leaves the outcome open gets one of the four, also where another code would describe it better.
"""

import errno
from collections.abc import Mapping

from grpc import StatusCode

from csi_driver.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OperationPending,
    OutOfRange,
    RecordDamaged,
    ResourceExhausted,
    Unavailable,
)
from csi_driver.linux.commands import CommandFailed, CommandMissing
from csi_driver.telemetry import logs

MAX_MESSAGE_BYTES = 2000
"""gRPC sends the message percent-encoded, so three times as long, in headers of which a peer takes 8 KiB (metadata size limit)."""

CODES: Mapping[type[BaseException], StatusCode] = {
    InvalidArgument: StatusCode.INVALID_ARGUMENT,
    OutOfRange: StatusCode.OUT_OF_RANGE,
    NotFound: StatusCode.NOT_FOUND,
    AlreadyExists: StatusCode.ALREADY_EXISTS,
    OperationPending: StatusCode.ABORTED,
    DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    Unavailable: StatusCode.UNAVAILABLE,
    ResourceExhausted: StatusCode.RESOURCE_EXHAUSTED,
    FailedPrecondition: StatusCode.FAILED_PRECONDITION,
    RecordDamaged: StatusCode.INTERNAL,
    CommandFailed: StatusCode.INTERNAL,  # it ended by itself and said no; being killed is UNAVAILABLE, see below
    CommandMissing: StatusCode.INTERNAL,
    NotImplementedError: StatusCode.UNIMPLEMENTED,  # of the generated servicers: a call that this role does not serve
    TimeoutError: StatusCode.DEADLINE_EXCEEDED,  # without an errno: a wait of Python's own
}

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# The server, the network or this process is in trouble that may pass, and how far the call got is not known. EIO is what a soft NFS
# mount says after its timeout. EROFS is among them because a filesystem turns read-only in the midst of work, after an error, and
# EBUSY because an unmount can have taken one of several layers.
_IN_TROUBLE = (
    *(
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EIO,
        errno.EREMOTEIO,
        errno.ENOLCK,
        errno.EROFS,
        errno.EBUSY,
        errno.EAGAIN,
        errno.EINTR,
    ),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ESHUTDOWN),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)
ERRNO_CODES: Mapping[int, StatusCode] = {
    **dict.fromkeys(_NO_ROOM, StatusCode.RESOURCE_EXHAUSTED),
    **dict.fromkeys(_IN_TROUBLE, StatusCode.UNAVAILABLE),
}


def to_status(error: BaseException) -> tuple[StatusCode, str]:
    """Return the gRPC code and message of an error. What is in no table is INTERNAL, with no more than the request's id."""
    code = _code_of(error)
    if code is not None:
        return code, _sendable(str(error) or type(error).__name__)
    request = logs.current_request()
    where = f"request {request.request_id}" if request else "this call"
    return StatusCode.INTERNAL, f"the driver failed in a way nobody foresaw; its log has the details of {where}"


def _code_of(error: BaseException) -> StatusCode | None:
    if isinstance(error, OSError) and error.errno is not None:
        return ERRNO_CODES.get(error.errno)
    if isinstance(error, CommandFailed) and error.returncode < 0:
        return StatusCode.UNAVAILABLE  # killed in the midst of it
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), None)


def _sendable(message: str) -> str:
    # File names that are not UTF-8 hold lone surrogates, which gRPC could not send.
    data = message.encode("utf-8", "backslashreplace")
    if len(data) > MAX_MESSAGE_BYTES:
        return data[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "…"
    return data.decode()
