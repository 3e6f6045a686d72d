"""Remove what a run of the suite that was killed has left in the cluster: its pods would take the next one's room on the nodes.

The suite removes what it makes, also when it is interrupted. Its namespaces have a label, and what it makes of cluster-wide kinds
begins with the name of the namespace that it was made for.
"""

from cluster.kubectl import Kubectl
from cluster.progress import step, wait_until

LABEL = "e2e-framework"
CLUSTER_WIDE = ("storageclass", "volumesnapshotclass", "volumegroupsnapshotclass", "volumeattributesclass")


def clear() -> None:
    """Remove the namespaces of specs that nobody runs any more, and wait until their volumes are gone. Raises TimeoutError."""
    client = Kubectl()
    stale = {namespace["metadata"]["name"] for namespace in client.find("namespaces", LABEL)}
    if not stale:
        return
    with step(f"removing what an earlier run has left: {' '.join(sorted(stale))}"):
        client.delete("namespace", *stale, timeout=180)
        wait_until("the end of an earlier run's volumes", lambda: not _volumes_of(client, stale), 90)
        for kind in CLUSTER_WIDE:
            names = [item["metadata"]["name"] for item in client.find(kind)]
            if mine := [name for name in names if name.startswith(tuple(stale))]:
                client.delete(kind, *mine)


def _volumes_of(client: Kubectl, namespaces: set[str]) -> list[str]:
    return [
        volume["metadata"]["name"]
        for volume in client.find("pv")
        if (volume["spec"].get("claimRef") or {}).get("namespace") in namespaces
    ]
