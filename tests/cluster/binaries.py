"""Build Kubernetes, the sidecars and Kubernetes' own storage suite from their modules, once for each set of pins.

`binaries/go.mod` names them all as tools. What was built is good until that file, go.sum or the compiler changes: the stamp beside
the programs is their digest. The suite has a stamp of its own: it takes as long as all the rest, and a cluster does without it.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cluster.layout import BINARIES, HERE
from cluster.progress import say, step

MODULE = HERE / "binaries"
STAMP = BINARIES / "pins.sha256"
SUITE_STAMP = BINARIES / "suite-pins.sha256"
SUITE = "k8s.io/kubernetes/test/e2e"
SUITE_TOOLS = ("github.com/onsi/ginkgo/v2/ginkgo", "k8s.io/kubernetes/test/images/agnhost")
SNAPSHOT_CLIENT = "github.com/kubernetes-csi/external-snapshotter/client/v8"
SNAPSHOTTER = "github.com/kubernetes-csi/external-snapshotter/v8"


def build() -> Path:
    """Build what a cluster is made of, as far as it is missing, and return the directory of the programs; minutes when cold."""
    digest = _digest()
    if not _is_built(STAMP, digest):
        tools = [tool for tool in _go("list", "tool").split() if tool not in SUITE_TOOLS]
        with step(f"building Kubernetes {_version('k8s.io/kubernetes')} and the sidecars ({len(tools)} programs)"):
            _build_tools(tools)
        STAMP.write_text(digest)
    return BINARIES


def build_suite() -> Path:
    """Build `e2e.test`, the program that runs its specs in parallel, and the one in its pods; four minutes and 2 GB when cold."""
    digest = _digest()
    if not _is_built(SUITE_STAMP, digest):
        flags = _linker_flags(_version("k8s.io/kubernetes"))
        with step("building Kubernetes' external-storage suite"):
            _build_tools(SUITE_TOOLS)
            _go("test", "-c", "-vet=off", "-trimpath", "-ldflags", flags, "-o", str(BINARIES / "e2e.test"), SUITE)
            say("  e2e.test")
        SUITE_STAMP.write_text(digest)
    return BINARIES


def snapshot_crds() -> Path:
    """Return the directory with the snapshots' CustomResourceDefinitions."""
    return _directory(SNAPSHOT_CLIENT) / "config" / "crd"


def snapshot_controller_rbac() -> Path:
    """Return the snapshot-controller's own RBAC manifest."""
    return _directory(SNAPSHOTTER) / "deploy" / "kubernetes" / "snapshot-controller" / "rbac-snapshot-controller.yaml"


def _is_built(stamp: Path, digest: str) -> bool:
    return stamp.exists() and stamp.read_text() == digest


def _build_tools(tools: Iterable[str]) -> None:
    flags = _linker_flags(_version("k8s.io/kubernetes"))
    BINARIES.mkdir(parents=True, exist_ok=True)
    for tool in tools:
        # One at a time: linking two of them at once takes twice the memory, and no less time on few cores.
        _go("build", "-trimpath", "-ldflags", flags, "-o", f"{BINARIES}/", tool)
        say(f"  {tool.rpartition('/')[2]}")


def _digest() -> str:
    pins = hashlib.sha256()
    for name in ("go.mod", "go.sum"):
        pins.update((MODULE / name).read_bytes())
    pins.update(_go("env", "GOVERSION").encode())
    return pins.hexdigest()


def _version(module: str) -> str:
    return json.loads(_go("list", "-m", "-json", module))["Version"]


def _directory(module: str) -> Path:
    return Path(json.loads(_go("mod", "download", "-json", f"{module}@{_version(module)}"))["Dir"])


def _linker_flags(version: str) -> str:
    major, minor, _ = version.removeprefix("v").split(".")
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    # Without a version the API server says v0.0.0-master, and kubectl and the sidecars take it at its word.
    return "-s -w " + " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in values.items())


def _go(*arguments: str) -> str:
    done = subprocess.run(
        ["nice", "-n", "10", "go", *arguments],
        cwd=MODULE,
        env={**os.environ, "CGO_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()
