"""A hostile tenant, as a process: swaps what lies in his volume for ways out of it, as fast as he can, until he is told to stop.

    python swapper.py DIRECTORY OUTSIDE SECONDS

He is nobody (65534), works in DIRECTORY alone, and may not even read what lies in OUTSIDE: whoever walks through his tree as root may.
Prints how often he swapped.
"""

import contextlib
import ctypes
import itertools
import os
import sys
import time
from pathlib import Path

from csi_driver.linux import btrfs

NOBODY = 65534
RENAME_EXCHANGE = 2
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: str, two: str) -> None:
    """Swap two names in one step: there is no moment at which either is missing (renameat2(2))."""
    if _libc.renameat2(AT_FDCWD, one.encode(), AT_FDCWD, two.encode(), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def prepare(outside: str) -> list[tuple[str, str]]:
    """Make pairs of names: something that belongs here, and a way out of here."""
    up = "../" * 12 + outside.lstrip("/")
    pairs = []
    for number in range(4):
        folder = Path(f"folder-{number}/inner")
        folder.mkdir(parents=True)
        for name in ("secret", "own", "last"):
            (folder / name).write_bytes(b"the tenant's own")
        for place, way_out in ((f"folder-{number}", outside), (f"folder-{number}/inner", f"{up}/inner")):
            os.symlink(way_out, f"{place}.out")
            pairs.append((place, f"{place}.out"))
        file = f"file-{number}"
        Path(file).write_bytes(b"the tenant's own" * 1000)
        os.link(file, f"hard-{number}")
        os.symlink(f"{outside}/secret", f"{file}.out")
        os.mkfifo(f"{file}.fifo")
        os.symlink(f"{up}/secret", f"folder-{number}/escape")
        pairs += [(file, f"{file}.out"), (f"hard-{number}", f"{file}.fifo"), (f"folder-{number}", f"hard-{number}")]
        pairs.append((f"folder-{number}/inner/secret", f"folder-{number}/escape"))
    # A chain of directories that is moved away from under a walk, so that its `..` is another's.
    deep = Path("deep", *map(str, range(80)))
    deep.mkdir(parents=True)
    (deep / "bottom").write_bytes(b"the tenant's own")
    Path("away").mkdir()
    os.symlink(outside, "away.out")
    pairs += [("deep/0/1/2", "away"), ("away", "away.out")]
    return pairs


def own_subvolume(parent: str) -> None:
    """Make a btrfs subvolume where that can be: then snapshots walk here, too."""
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        btrfs.create(descriptor, "own-subvolume")
    os.close(descriptor)


def main(directory: str, outside: str, seconds: float) -> None:
    os.chdir(directory)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    with contextlib.suppress(FileExistsError):
        os.mkdir("here")
    with contextlib.suppress(FileExistsError):
        os.mkdir(f"here/{os.getpid()}")
    os.chdir(f"here/{os.getpid()}")
    own_subvolume(".")
    pairs, until, done = prepare(outside), time.monotonic() + seconds, 0
    print("ready", flush=True)
    for round_, (one, two) in enumerate(itertools.cycle(pairs)):
        if one.startswith("deep") and round_ % 97:
            continue  # whoever walks there has to begin anew; often enough is enough
        if time.monotonic() > until or os.stat(".").st_nlink == 0:
            break
        with contextlib.suppress(OSError):  # he is being removed, or has swapped the way to it
            exchange(one, two)
            done += 1
        if done % 7 == 0:
            with contextlib.suppress(OSError):
                os.unlink("link")
            with contextlib.suppress(OSError):
                os.link("file-0", "link", follow_symlinks=False)
    print(done, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
