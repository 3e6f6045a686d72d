"""The filesystems of images on a node: recognised, checked, mounted, grown. Never made: that happened when the volume was."""

import time
from pathlib import Path

from csi_driver.errors import FailedPrecondition, OperationPending, Unavailable, quoted
from csi_driver.linux import image_child, image_filesystems, loop_devices
from csi_driver.linux.bind_flags import parse_bind_flags
from csi_driver.linux.commands import CommandFailed
from csi_driver.volumes.jobs import JobControl, Jobs
from csi_driver.volumes.model import AccessType
from csi_driver.volumes.node_state import NodeVolumeRecord
from csi_driver.volumes.requests import Capability

_SECONDS = 30.0
_CHECK_SECONDS = 24 * 3600.0
_STOP_SECONDS = 5.0
_CHECK_WAIT_SECONDS = 75.0  # the kubelet waits for two minutes, and the rest takes its time, too
_FLAGS = "volume_capability.mount.mount_flags"


class ImageFilesystems:
    """Works on the filesystems of attached images. The caller holds the volume's lock."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def mount(self, known: NodeVolumeRecord, capability: Capability, staging: Path) -> None:
        """Mount the filesystem of an attached image, checked, and as large as its device.

        Raises FailedPrecondition (not what was made, or damaged), OperationPending while it is being checked or grown, Unavailable.
        """
        node, fs_type = loop_devices.node_of(known.device), known.form.fs_type
        found = image_child.recognise(node, _SECONDS)
        if found is None or found[0] != fs_type:
            raise FailedPrecondition(
                f"the image of volume {quoted(known.handle)} does not begin with the {fs_type} that was made in it; it is left as it is"
            )
        self._prepare(known)
        image_filesystems.mount(
            node,
            staging,
            fs_type,
            parse_bind_flags(capability.mount_flags, _FLAGS),
            read_only=capability.access_mode.reader_only,
            seconds=_CHECK_WAIT_SECONDS,
        )
        self.grow_if_allowed(known)

    def _prepare(self, known: NodeVolumeRecord) -> None:
        """Check the filesystem, and grow what can only be grown unmounted, in a job that a retry joins: a large one takes its time."""

        def work(job: JobControl) -> None:
            node, fs_type = loop_devices.node_of(known.device), known.form.fs_type
            try:
                job.begin("checking the filesystem", None)
                image_filesystems.check(node, fs_type, _CHECK_SECONDS, job.should_stop)
                found = image_child.recognise(node, _SECONDS)
                too_small = found is not None and found[1] < loop_devices.size_of(known.device)
                if too_small and not image_filesystems.may_grow_mounted(fs_type) and not job.should_stop():
                    job.begin("growing the filesystem", None)
                    image_filesystems.grow_unmounted(node, _CHECK_SECONDS, job.should_stop)
            except FailedPrecondition as damage:
                raise FailedPrecondition(
                    f"the filesystem of volume {quoted(known.handle)} needs a person: {damage}. docs/images.md says how to repair it"
                ) from damage

        self._jobs.run(_check_key(known.handle), work, time.monotonic() + _CHECK_WAIT_SECONDS)

    def stop_check(self, handle: str) -> None:
        """Stop a check that is under way: the volume is about to be taken away.

        Raises OperationPending while a filesystem that is not mounted is being grown: that is not stopped.
        """
        job = self._jobs.find(_check_key(handle))
        self._jobs.cancel(_check_key(handle))
        if job is not None and not job.finished.wait(_STOP_SECONDS):
            raise OperationPending(
                f"the filesystem of volume {quoted(handle)} is at work ({job.describe()}) and must come to its end; try again"
            )

    def grow_if_allowed(self, known: NodeVolumeRecord) -> None:
        """Grow the mounted filesystem, unless this process may not grow one of its kind while it is mounted. Raises as `grow` does."""
        if image_filesystems.may_grow_mounted(known.form.fs_type):
            self.grow(known)

    def grow(self, known: NodeVolumeRecord) -> None:
        """Make the mounted filesystem as large as its device; raw block has none.

        It is a job that a retry joins. Raises FailedPrecondition where that is not allowed while it is mounted, OperationPending, Unavailable.
        """
        if known.form.access_type is AccessType.BLOCK or known.access_mode.reader_only:
            return
        node, size = loop_devices.node_of(known.device), loop_devices.size_of(known.device)
        found = image_child.recognise(node, _SECONDS)
        if found is not None and found[1] == size:
            return

        def work(job: JobControl) -> None:
            job.begin("growing the filesystem", None)
            try:
                image_filesystems.grow_mounted(node, Path(known.staging_path), known.form.fs_type)
            except CommandFailed as error:
                raise Unavailable(f"the filesystem of volume {quoted(known.handle)} could not be grown yet: {error}") from error

        # To this size: who wants more meanwhile must not take the growth that is under way for his own. The kernel lets in one at a time.
        self._jobs.run(f"growth of {known.handle} to {size}", work, time.monotonic() + _CHECK_WAIT_SECONDS)


def _check_key(handle: str) -> str:
    return f"check of {handle}"
