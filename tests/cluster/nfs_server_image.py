"""The image of an NFS server that runs in a pod: nfs-ganesha in user space, on the same Debian as the driver's."""

import hashlib
from pathlib import Path

from cluster.driver_image import logged, make_base
from cluster.images import IMAGES
from cluster.layout import HERE
from cluster.progress import step

CONTEXT = HERE / "nfs-server"


def nfs_server_image() -> tuple[str, Path]:
    """Return the image's name and its archive; half a minute the first time, and whenever its Dockerfile changed."""
    digest = hashlib.sha256((CONTEXT / "Dockerfile").read_bytes()).hexdigest()[:12]
    name = f"localhost/nfs-ganesha:{digest}"
    archive = IMAGES / f"nfs-server-{digest}.tar"
    if archive.exists():
        return name, archive
    make_base()
    with step("building the NFS server's image"):
        logged("nfs-server", "buildah", "bud", "--pull-never", "--tag", name, str(CONTEXT))
        IMAGES.mkdir(parents=True, exist_ok=True)
        for stale in IMAGES.glob("nfs-server-*"):
            stale.unlink()
        partial = archive.with_suffix(".partial")
        logged("nfs-server", "buildah", "push", "--quiet", name, f"docker-archive:{partial}:{name}")
        partial.rename(archive)
        # The archive is all that anybody reads.
        logged("nfs-server", "buildah", "rmi", name)
    return name, archive
