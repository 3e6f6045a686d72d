#!/usr/bin/env python3
"""Render deploy/manifests from the chart, for those who do not use Helm, or say with --check which of them is stale.

The rendered files are committed, so that a review shows what a change of the chart does to a cluster. HELM names the helm to use.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy" / "chart" / "tatami"
MANIFESTS = ROOT / "deploy" / "manifests"
NAMESPACE = "tatami-system"
KUBERNETES = "1.36.0"

APIS = ("snapshot.storage.k8s.io/v1", "groupsnapshot.storage.k8s.io/v1", "storage.k8s.io/v1/VolumeAttributesClass")
"""What a cluster must have for the rendered manifests; the chart itself looks, and leaves out what is not there."""

# The options of helm and what a reader is to know, for each file.
KINDS = {
    "hostpath.yaml": (
        (),
        """hostPath volumes, with the chart's defaults. Needs the snapshot CRDs, and a snapshot-controller that runs with
# --enable-distributed-snapshotting.""",
    ),
    "nfs.yaml": (
        (
            "--set=hostpath.enabled=false",
            "--set=nfs.pools.default.server=nfs.example.com",
            "--set=nfs.pools.default.path=/srv/tatami",
        ),
        """NFS volumes. Put your server and share into the ConfigMap. Needs the snapshot CRDs, those of groups too, and the
# snapshot-controller.""",
    ),
}

_HEAD = """\
# {about}
#
# Rendered from deploy/chart/tatami by `make manifests`; change the chart, not this file. The images carry no registry: put it in front
# of them. The namespace {namespace} is yours to make, with the label pod-security.kubernetes.io/enforce: privileged. Kubernetes 1.34
# or newer: an older one has no VolumeAttributesClass.
"""


def helm(*arguments: str) -> str:
    """Run helm and return what it prints. Raises RuntimeError with its complaint."""
    done = subprocess.run([os.environ.get("HELM", "helm"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def template(*options: str, apis: tuple[str, ...] = APIS) -> str:
    """Return what the chart makes of these options. Raises RuntimeError."""
    given = [f"--api-versions={api}" for api in apis]
    return helm("template", "tatami", str(CHART), f"--namespace={NAMESPACE}", f"--kube-version={KUBERNETES}", *given, *options)


def render(name: str) -> str:
    """Return what deploy/manifests/`name` should hold."""
    options, about = KINDS[name]
    # These objects are nobody's release.
    helms_own = ("# Source: ", "app.kubernetes.io/managed-by: ", "helm.sh/chart: ")
    lines = [line for line in template(*options).splitlines() if not line.strip().startswith(helms_own)]
    return _HEAD.format(about=about, namespace=NAMESPACE) + "\n".join(lines) + "\n"


def main() -> int:
    """Write what is stale, or with --check name it and return 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a committed file is stale")
    check = parser.parse_args().check
    MANIFESTS.mkdir(exist_ok=True)
    stale = 0
    for name in KINDS:
        wanted, file = render(name), MANIFESTS / name
        if file.is_file() and file.read_text() == wanted:
            continue
        stale += 1
        if not check:
            file.write_text(wanted)
        sys.stderr.write(f"{file.relative_to(ROOT)}: {'is stale, run `make manifests`' if check else 'written'}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
