"""The mount table, kept: read anew only when the kernel says that it changed.

Whoever asks before each step whether a mount is still there would parse the same table a hundred times. An open mountinfo tells a
change by poll(2) (POLLERR | POLLPRI, proc(5)), which costs one system call.
"""

import os
import select
import threading
from pathlib import Path

from csi_driver.linux.mountinfo import Mount, read_mounts, resolved, visible_stack


class MountTable:
    """What is seen at one path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = threading.Lock()
        self._changes = select.poll()
        self._descriptor = -1
        self._top: Mount | None = None

    def top(self) -> Mount | None:
        """Return what is mounted on the path and seen there, or None."""
        with self._guard:
            if self._changed():
                stack = visible_stack(read_mounts(), resolved(self._path))
                self._top = stack[-1] if stack else None
            return self._top

    def close(self) -> None:
        with self._guard:
            if self._descriptor >= 0:
                self._changes.unregister(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1

    def _changed(self) -> bool:
        if self._descriptor < 0:
            # The kernel counts changes from this open on: what is read after it can only be newer.
            self._descriptor = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            self._changes.register(self._descriptor, select.POLLPRI)
            return True
        return bool(self._changes.poll(0))
