"""A pod's fsGroup (VOLUME_MOUNT_GROUP): done by the driver, once for a volume, instead of by the kubelet at each start of a pod.

A new volume is given to the group in one step, whatever is put into it later; content that came with a restore or a clone is walked
once, as a job that a retry joins. How it is known that it was done: linux/group_change.py.
"""

import errno
import time
from pathlib import Path

from csi_driver.backends.base import PoolBackend
from csi_driver.errors import FailedPrecondition, quoted
from csi_driver.volumes.jobs import JobControl, Jobs

_WAIT_SECONDS = 90.0  # the kubelet waits for two minutes


class MountGroups:
    """Gives mounted volumes to groups."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def give(self, handle: str, backend: PoolBackend, mounted: Path, group: str) -> None:
        """Give the volume that is mounted, writable, at `mounted` to `group`, a number.

        Raises OperationPending while its content is being walked, FailedPrecondition where the server squashes root, Unavailable.
        """

        def work(job: JobControl) -> None:
            def should_stop(done: int) -> bool:
                job.progress.files = done
                return job.should_stop()

            try:
                backend.change_group(mounted, int(group), should_stop)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EACCES):
                    raise
                raise FailedPrecondition(
                    f"volume {quoted(handle)} cannot be given to group {group} (fsGroup): the server lets root change nothing; export the "
                    "pool with `no_root_squash`, or leave fsGroup out"
                ) from error

        self._jobs.run(_key(handle), work, time.monotonic() + _WAIT_SECONDS)

    def stop(self, handle: str) -> None:
        """Stop a walk that is under way: the volume is about to be taken away."""
        self._jobs.cancel(_key(handle))


def _key(handle: str) -> str:
    return f"group of {handle}"
