"""Content of volumes that can be told from every other content, and the manifest by which it is compared."""

import hashlib
import os
import random
import stat
from pathlib import Path

LIGHT, HEAVY = "light", "heavy"

Manifest = dict[str, tuple]
"""Path below the top -> everything that must survive."""


def fill(top: Path, rng: random.Random, weight: str) -> None:
    """Write content that no other call writes. A heavy one takes a copy long enough to be killed in the middle of it."""
    for folder in ("a", "a/b", "c"):
        (top / folder).mkdir(exist_ok=True)
    for number in range(120 if weight == HEAVY else 12):
        _write(top / rng.choice(("a", "a/b", "c", ".")) / f"file-{number}", rng.randbytes(rng.randrange(1, 9000)), rng)
    if weight == HEAVY:
        for number in range(3):
            _write(top / f"large-{number}", rng.randbytes(rng.randrange(1, 4) * 1024**2), rng)
    _write(top / "once", rng.randbytes(64), rng)
    os.link(top / "once", top / "a" / "twice")
    os.symlink("/nowhere/at/all", top / "c" / "link")


def change(top: Path, rng: random.Random) -> None:
    """Replace, add and remove some of it, as a pod does."""
    _write(top / "once", rng.randbytes(64), rng)
    _write(top / "c" / f"new-{rng.randrange(1000)}", rng.randbytes(5000), rng)
    for victim in sorted(top.glob("a/b/file-*"))[:1]:
        victim.unlink()


def _write(path: Path, data: bytes, rng: random.Random) -> None:
    path.write_bytes(data)
    path.chmod(rng.choice((0o600, 0o644, 0o755)))


def manifest(top: Path) -> Manifest:
    """Describe everything below `top`: kind, mode, owner, times, links and the exact bytes."""
    found: Manifest = {}
    first_name: dict[int, str] = {}

    def walk(directory: str, prefix: str) -> None:
        for entry in sorted(os.scandir(directory), key=lambda each: each.name):
            status = entry.stat(follow_symlinks=False)
            name = prefix + entry.name
            common = (oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
            if stat.S_ISDIR(status.st_mode):
                found[name] = common
                walk(entry.path, name + "/")
            elif stat.S_ISLNK(status.st_mode):
                found[name] = (*common, os.readlink(entry.path))
            else:
                with open(entry.path, "rb", buffering=0) as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[name] = (*common, status.st_size, digest, first_name.setdefault(status.st_ino, name))

    walk(str(top), "")
    return found


def newest_ns(content: Manifest) -> int:
    return max((entry[3] for entry in content.values()), default=0)


def difference(found: Manifest, expected: Manifest) -> str:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    return f"{len(missing)} missing {missing[:3]}, {len(extra)} too many {extra[:3]}, {len(other)} differ {other[:3]}"
