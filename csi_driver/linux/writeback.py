"""Bringing what is copied to disk along the way, so that nobody has to wait for all of it at once.

Gigabytes in the page cache are one long stall for whoever needs the journal next: an fsync of another's small file waits for them
(ext4's data=ordered). So a large file is handed to the disk in steps, and the copy itself waits until the step before last is there.
A step is as large as a disk that others keep busy needs to be given: each wait stands in line behind what they have asked for.
"""

from csi_driver.linux.system_calls import sync_file_range_wait, sync_file_range_write

STEP_BYTES = 8 * 1024 * 1024
_SMALL_BYTES = 1024 * 1024


class SteadyWriteback:
    """Follows one file that is written from its start to its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._begun = 0
        self._asked = 0

    def written(self, position: int) -> None:
        """Hear that the file is written up to `position` (bytes)."""
        if position - self._asked < STEP_BYTES:
            return
        sync_file_range_write(self._descriptor, self._asked, position - self._asked)
        if self._asked > self._begun:
            sync_file_range_wait(self._descriptor, self._begun, self._asked - self._begun)
        self._begun, self._asked = self._asked, position

    def finished(self, position: int) -> None:
        """Hear that the file is complete: what is left of a larger one is sent on its way, nothing is waited for."""
        if position >= _SMALL_BYTES and position > self._asked:
            sync_file_range_write(self._descriptor, self._asked, position - self._asked)
