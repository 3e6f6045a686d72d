"""The driver's image, built from the project's Dockerfile by buildah: no daemon, no registry.

The Dockerfile's base is Debian; here it is made from Debian's packages, once. Everything lies in a store of its own below .cache.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cluster.layout import CACHE, CHECKOUT
from cluster.progress import say, step

STORE = CACHE / "buildah"
BASE = "docker.io/library/debian:bookworm-slim"
NAME = "localhost/tatami"
SUITE = "bookworm"


def driver_image() -> tuple[str, Path]:
    """Return the image's name and its archive for the checkout as it is now; a minute when the driver changed, two when cold."""
    name = f"{NAME}:{_digest()}"
    archive = CACHE / "images" / f"driver-{name.rpartition(':')[2]}.tar"
    if archive.exists():
        return name, archive
    make_base()
    if not any((CHECKOUT / "wheels").glob("*.whl")):
        subprocess.run(["make", "--no-print-directory", "wheels"], cwd=CHECKOUT, check=True)
    with step("building the driver's image"):
        logged("build", str(CHECKOUT / "deploy" / "build-image"), name)
        archive.parent.mkdir(exist_ok=True)
        for stale in archive.parent.glob("driver-*"):
            stale.unlink()
        partial = archive.with_suffix(".partial")
        logged("build", "buildah", "push", "--quiet", name, f"docker-archive:{partial}:{name}")
        partial.rename(archive)
        _forget_others(name)
    say(f"the driver's image has {archive.stat().st_size / 1e6:.0f} MB")
    return name, archive


def _forget_others(name: str) -> None:
    """Remove earlier images of the driver and what only they were made from: without layers that share files, that is gigabytes."""
    known = logged("build", "buildah", "images", "--format", "{{.Name}}:{{.Tag}}").split()
    for other in known:
        if other.startswith(f"{NAME}:") and other != name:
            logged("build", "buildah", "rmi", other)
    logged("build", "buildah", "rmi", "--prune", "--force")


def make_base() -> None:
    """Make the local image that Debian's has the name of, unless it is there."""
    STORE.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["buildah", "inspect", BASE], env=_environment(), capture_output=True, check=False).returncode == 0:
        return
    with step(f"making {BASE} from Debian's packages"):
        root = STORE / "base"
        shutil.rmtree(root, ignore_errors=True)
        try:
            logged("base", "debootstrap", "--variant=minbase", SUITE, str(root))
            container = logged("base", "buildah", "from", "--name", "base", "scratch").strip()
            logged("base", "buildah", "add", "--quiet", container, str(root), "/")
            logged("base", "buildah", "commit", "--quiet", "--rm", container, BASE)
        finally:
            shutil.rmtree(root, ignore_errors=True)


def _environment() -> dict[str, str]:
    configuration = STORE / "storage.conf"
    # vfs: overlay cannot be stacked on the overlay that a checkout may lie on.
    configuration.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{STORE}/images"\nrunroot = "{STORE}/run"\n')
    return {
        **os.environ,
        "CONTAINERS_STORAGE_CONF": str(configuration),
        "BUILDAH_ISOLATION": "chroot",
        "ENGINE": "buildah",
        "BUILD_FLAGS": "--pull-never --layers",
    }


def logged(log: str, *command: str) -> str:
    """Run a command, keep what it says on stderr in a log, return its output. Raises RuntimeError with the log's end."""
    path = STORE / f"{log}.log"
    with path.open("ab") as stream:
        done = subprocess.run(
            ["nice", "-n", "10", *command],
            cwd=CHECKOUT,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            check=False,
        )
    with path.open("a") as stream:
        stream.write(done.stdout)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n" + "\n".join(path.read_text().splitlines()[-30:]))
    return done.stdout


def _digest() -> str:
    content = hashlib.sha256()
    for path in sorted(_sources()):
        content.update(f"{path.relative_to(CHECKOUT)}\n".encode() + path.read_bytes())
    return content.hexdigest()[:12]


def _sources() -> Iterator[Path]:
    yield from (
        CHECKOUT / name for name in ("Dockerfile", "pyproject.toml", "requirements/runtime.txt", "requirements/build.txt")
    )
    yield from (path for path in (CHECKOUT / "csi_driver").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
