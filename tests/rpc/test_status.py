import errno

import pytest
from grpc import StatusCode

from csi_driver import errors
from csi_driver.linux.commands import CommandFailed, CommandMissing
from csi_driver.rpc.status import ERRNO_CODES, MAX_MESSAGE_BYTES, to_status
from csi_driver.telemetry import logs
from csi_driver.volumes.jobs import JobCancelled

MAY_HAVE_HAPPENED = {StatusCode.CANCELLED, StatusCode.DEADLINE_EXCEEDED, StatusCode.UNAVAILABLE, StatusCode.ABORTED}


def subclasses(kind):
    return [kind, *(below for child in kind.__subclasses__() for below in subclasses(child))]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidArgument, StatusCode.INVALID_ARGUMENT),
        (errors.OutOfRange, StatusCode.OUT_OF_RANGE),
        (errors.NotFound, StatusCode.NOT_FOUND),
        (errors.AlreadyExists, StatusCode.ALREADY_EXISTS),
        (errors.OperationPending, StatusCode.ABORTED),
        (errors.LockLost, StatusCode.ABORTED),
        (JobCancelled, StatusCode.ABORTED),
        (errors.DeadlineExceeded, StatusCode.DEADLINE_EXCEEDED),
        (errors.Unavailable, StatusCode.UNAVAILABLE),
        (errors.ResourceExhausted, StatusCode.RESOURCE_EXHAUSTED),
        (errors.FailedPrecondition, StatusCode.FAILED_PRECONDITION),
        (errors.RecordDamaged, StatusCode.INTERNAL),
    ],
)
def test_each_error_has_the_code_of_the_design_and_keeps_its_words(kind, code):
    assert to_status(kind("pool fast is away")) == (code, "pool fast is away")


@pytest.mark.parametrize("kind", subclasses(errors.TatamiError)[1:])
def test_no_error_of_the_driver_is_unforeseen(kind):
    assert to_status(kind("the reason"))[1] == "the reason"


def test_an_error_derived_later_has_the_code_of_the_nearest_known_class():
    class ShareGone(errors.Unavailable):
        pass

    class Both(ShareGone, OSError):
        pass

    assert to_status(ShareGone("gone"))[0] is StatusCode.UNAVAILABLE
    assert to_status(Both("gone"))[0] is StatusCode.UNAVAILABLE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_filesystem_is_resource_exhausted(number):
    code, message = to_status(OSError(number, "no room", "/pool/x"))
    assert code is StatusCode.RESOURCE_EXHAUSTED
    assert "/pool/x" in message


@pytest.mark.parametrize(
    "name",
    [
        "ESTALE",
        "ETIMEDOUT",
        "EIO",
        "EROFS",
        "EBUSY",
        "ENETUNREACH",
        "EHOSTUNREACH",
        "ENETDOWN",
        "EHOSTDOWN",
        "ECONNREFUSED",
        "ECONNRESET",
        "ENOTCONN",
        "ENOLCK",
        "EMFILE",
    ],
)
def test_trouble_that_leaves_the_outcome_open_is_never_called_certain(name):
    code, _ = to_status(OSError(getattr(errno, name), "trouble"))
    assert code in MAY_HAVE_HAPPENED


def test_the_errno_table_knows_only_room_and_trouble():
    assert set(ERRNO_CODES.values()) == {StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "no such file", "/secret/place"), ValueError("internals"), KeyError("x")]
)
def test_what_nobody_foresaw_is_internal_and_says_only_where_to_look(error):
    with logs.bind_request("r-17", "CreateVolume"):
        code, message = to_status(error)
    assert code is StatusCode.INTERNAL
    assert "r-17" in message
    assert not any(word in message for word in ("secret", "internals", "such file", "'x'"))


def test_a_wait_of_pythons_own_that_ran_out_is_deadline_exceeded():
    assert to_status(TimeoutError("no answer"))[0] is StatusCode.DEADLINE_EXCEEDED


def test_a_command_that_said_no_is_shown_and_one_that_was_killed_leaves_it_open():
    code, message = to_status(CommandFailed(["mkfs.ext4", "/x"], 1, "", "bad superblock"))
    assert code is StatusCode.INTERNAL
    assert "bad superblock" in message
    assert to_status(CommandFailed(["mkfs.ext4", "/x"], -9, "", ""))[0] in MAY_HAVE_HAPPENED
    assert "mkfs.ext4" in to_status(CommandMissing("mkfs.ext4", "No such file"))[1]


@pytest.mark.parametrize("text", ["x" * 10**6, "…" * 10**6, "\udcff name", "a\nb\0c", "🦄" * 5000])
def test_every_message_can_be_sent(text):
    _, message = to_status(errors.NotFound(text))
    assert 0 < len(message.encode()) <= MAX_MESSAGE_BYTES + 3


def test_an_error_without_words_still_has_a_message():
    assert to_status(errors.Unavailable()) == (StatusCode.UNAVAILABLE, "Unavailable")
