"""Images without a registry: archives of a root directory that containerd imports, one per program, made once.

Pods ask for them by the names that manifests have; what lies behind is built here. An archive is a tar in the layout that
`docker save` writes (manifest.json, a configuration, one layer).
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.layout import BINARIES, CACHE

IMAGES = CACHE / "images"
BUSYBOX = "localhost/tatami/busybox:1"
APPLETS = (
    "sh", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "du", "echo", "env", "find", "grep", "head", "id", "ln", "ls", "md5sum",
    "mkdir", "mount", "mv", "od", "printf", "rm", "sed", "seq", "sha256sum", "sleep", "sort", "stat", "sync", "tail", "tar", "test",
    "touch", "tr", "true", "umount", "wc",
)  # fmt: skip


def pause(name: str) -> Path:
    """Return the archive of the image that holds a pod's namespaces. All it has to do is to be there until it is killed."""
    return _busybox(name, ["/bin/sleep", "2147483647"])


def busybox() -> Path:
    """Return the archive of the image that the stories' pods run: a shell and the usual small programs."""
    return _busybox(BUSYBOX, ["/bin/sh"])


def sidecar(name: str, program: str) -> Path:
    """Return the archive of a sidecar's image: its program and nothing else, under the name that the chart has."""
    source = BINARIES / program
    return _archive(name, {program: source}, [], [f"/{program}"])


def toolbox(name: str, programs: Mapping[str, Path], entrypoint: Sequence[str]) -> Path:
    """Return the archive of an image with all that busybox can do, and with other programs by their paths in it, which win."""
    listed = subprocess.run([_static_busybox(), "--list"], capture_output=True, text=True, check=True).stdout.split()
    applets = [applet for applet in listed if applet != "busybox" and f"bin/{applet}" not in programs]
    return _archive(name, {"bin/busybox": _static_busybox(), **programs}, applets, entrypoint)


def with_libraries(program: str) -> dict[str, Path]:
    """Return a program of this machine and the libraries it is linked with, by the paths that they have to have in an image."""
    found = shutil.which(program)
    if found is None:
        raise RuntimeError(f"there is no {program} on this machine")
    linked = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
    libraries = {path.lstrip("/"): Path(path) for path in re.findall(r"(/\S+) \(0x", linked)}
    return {f"bin/{program}": Path(found), **libraries}


def _busybox(name: str, entrypoint: Sequence[str]) -> Path:
    return _archive(name, {"bin/busybox": _static_busybox()}, APPLETS, entrypoint)


def _static_busybox() -> Path:
    source = shutil.which("busybox")
    if source is None:
        raise RuntimeError("there is no busybox: tests/cluster/install.sh")
    return Path(source)


def _archive(name: str, files: Mapping[str, Path], applets: Sequence[str], entrypoint: Sequence[str]) -> Path:
    made_of = {path: [source.stat().st_mtime_ns, source.stat().st_size] for path, source in files.items()}
    described = json.dumps([name, made_of, applets, entrypoint]).encode()
    IMAGES.mkdir(parents=True, exist_ok=True)
    label = name.rpartition("/")[2].replace(":", "-")
    target = IMAGES / f"{label}-{hashlib.sha256(described).hexdigest()[:12]}.tar"
    if target.exists():
        return target
    for stale in IMAGES.glob(f"{label}-*.tar"):
        stale.unlink()
    layer = _layer(files, applets)
    digest = hashlib.sha256(layer).hexdigest()
    configuration = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": list(entrypoint), "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            "history": [{"created_by": "tests/cluster/images.py"}],
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    partial = target.with_suffix(".partial")
    with tarfile.open(partial, "w") as archive:
        for member, content in (("manifest.json", manifest), ("config.json", configuration), ("layer.tar", layer)):
            archive.addfile(_entry(member, size=len(content)), io.BytesIO(content))
    partial.rename(target)
    return target


def _layer(files: Mapping[str, Path], applets: Sequence[str]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as layer:
        for directory, mode in (("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777)):
            layer.addfile(_entry(directory, kind=tarfile.DIRTYPE, mode=mode))
        for path, source in files.items():
            content = source.read_bytes()
            layer.addfile(_entry(path, size=len(content)), io.BytesIO(content))
        for applet in applets:
            link = _entry(f"bin/{applet}", kind=tarfile.SYMTYPE)
            link.linkname = "busybox"
            layer.addfile(link)
    return stream.getvalue()


def _entry(name: str, *, size: int = 0, kind: bytes = tarfile.REGTYPE, mode: int = 0o755) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.mode = size, kind, mode
    return entry
