"""Trees to fill volumes with, and what can be seen of them afterwards."""

import os
import stat
from pathlib import Path


def fill(top: Path, mark: str = "content") -> None:
    """Put into a volume what a careless copy would lose."""
    (top / "plain").write_text(mark)
    (top / "empty").touch()
    os.link(top / "plain", top / "same")
    (top / "link").symlink_to("../../etc/passwd")
    os.mkfifo(top / "pipe", 0o620)
    (top / "folder" / "deep").mkdir(parents=True)
    (top / "folder" / "deep" / "script").write_text("#!/bin/sh\n")
    (top / "folder" / "deep" / "script").chmod(0o4755)
    (top / "folder").chmod(0o2770)
    if os.geteuid() == 0:
        os.chown(top / "plain", 1234, 5678)
    os.setxattr(top / "empty", "user.note", b"kept")
    os.utime(top / "plain", ns=(10**18, 10**18))


def seen(top: Path) -> dict[str, tuple]:
    """Describe everything below (and the mode and owner of) a directory, so that two whole copies compare equal."""
    found: dict[str, tuple] = {}
    for folder, folders, files in os.walk(top):
        for name in [".", *folders, *files]:
            path = Path(folder, name)
            if name == "." and folder != str(top):
                continue
            status = path.lstat()
            what: object = None
            if stat.S_ISREG(status.st_mode):
                what = (path.read_bytes(), status.st_nlink, status.st_mtime_ns, os.listxattr(path))
            elif stat.S_ISLNK(status.st_mode):
                what = path.readlink()
            found[str(path.relative_to(top))] = (status.st_mode, status.st_uid, status.st_gid, what)
    return found
