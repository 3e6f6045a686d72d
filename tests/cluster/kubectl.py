"""kubectl: objects are dicts in, dicts out; waiting has a deadline and says what it saw last. Objects are read without it (api.py)."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cluster.api import Api, NotThere
from cluster.layout import BINARIES, KUBECONFIG
from cluster.progress import PATIENCE, wait_until

Object = dict[str, Any]


class KubectlError(RuntimeError):
    """kubectl ended with another code than 0; the text is what it said."""


class Kubectl:
    """The cluster's API under one identity and, unless a call says otherwise, one namespace."""

    def __init__(self, namespace: str = "default", kubeconfig: Path = KUBECONFIG) -> None:
        self.namespace = namespace
        self._kubeconfig = kubeconfig
        self._base = [str(BINARIES / "kubectl"), f"--kubeconfig={kubeconfig}", f"--namespace={namespace}"]

    def run(self, *arguments: str, stdin: str = "", timeout: float = 60) -> str:
        """Run kubectl and return what it printed. Raises KubectlError."""
        done = subprocess.run(
            [*self._base, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout * PATIENCE, check=False
        )
        if done.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)[:200]}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: Object) -> None:
        """Apply objects, all in one call."""
        self.run("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))

    def create(self, item: Object) -> None:
        """Create one object; unlike `apply` an existing one is an error."""
        self.run("create", "-f", "-", stdin=json.dumps(item))

    def get(self, kind: str, name: str) -> Object:
        """Return an object. Raises NotThere when there is none."""
        found: Object = self._api.read(f"{self._api.path(kind, self.namespace)}/{quote(name)}")
        return found

    def find(self, kind: str, selector: str = "") -> list[Object]:
        """List objects; `selector`: of labels."""
        query = f"?labelSelector={quote(selector)}" if selector else ""
        found: list[Object] = self._api.read(self._api.path(kind, self.namespace) + query)["items"]
        return found

    def exists(self, kind: str, name: str) -> bool:
        """Say whether there is such an object."""
        try:
            return bool(self.get(kind, name))
        except NotThere:
            return False

    @property
    def _api(self) -> Api:
        return _api(self._kubeconfig, self._kubeconfig.stat().st_mtime_ns)

    def delete(self, kind: str, *names: str, wait: bool = True, timeout: float = 90, now: bool = False) -> None:
        """Delete objects and, unless told otherwise, wait until they are gone. `now`: with a grace period of one second."""
        grace = ["--grace-period=1"] if now else []
        self.run("delete", kind, *names, "--ignore-not-found", f"--wait={str(wait).lower()}", *grace, timeout=timeout)

    def patch(self, kind: str, name: str, change: Mapping[str, Any], *more: str) -> None:
        """Merge a change into an object."""
        self.run("patch", kind, name, "--type=merge", "-p", json.dumps(change), *more)

    def exec(self, pod: str, *command: str, timeout: float = 60) -> str:
        """Run a program in a pod's first container. Raises KubectlError when it fails."""
        return self.run("exec", pod, "--", *command, timeout=timeout)

    def sh(self, pod: str, script: str, timeout: float = 60) -> str:
        """Run a shell script in a pod's first container."""
        return self.exec(pod, "sh", "-ec", script, timeout=timeout)

    def wait(self, kind: str, name: str, true: Callable[[Object], bool], seconds: float = 90) -> Object:
        """Wait until something is true of an object and return it. Raises TimeoutError with its last status."""
        seen: Object = {}

        def check() -> Object | None:
            seen.clear()
            seen.update(self.get(kind, name))
            return seen if true(seen) else None

        try:
            return dict(wait_until(f"{kind}/{name}", check, seconds))
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{json.dumps(seen.get('status', seen), indent=1)[:3000]}") from None

    def gone(self, kind: str, name: str, seconds: float = 90) -> None:
        """Wait until an object is gone."""
        wait_until(f"the end of {kind}/{name}", lambda: not self.exists(kind, name), seconds)

    def events(self, about: str = "") -> list[str]:
        """Return the namespace's events, oldest first, as `reason object: message`; `about`: the name of one object."""
        items = sorted(self.find("events"), key=lambda item: item.get("lastTimestamp") or item.get("eventTime") or "")
        return [
            f"{item.get('reason', '')} {item['involvedObject']['kind']}/{item['involvedObject'].get('name', '')}: {item.get('message', '')}"
            for item in items
            if not about or item["involvedObject"].get("name") == about
        ]


def ready(item: Mapping[str, Any], kind: str = "Ready") -> bool:
    """Say whether a condition of an object is true."""
    conditions: Sequence[Mapping[str, Any]] = item.get("status", {}).get("conditions", [])
    return any(condition["type"] == kind and condition["status"] == "True" for condition in conditions)


@lru_cache
def _api(kubeconfig: Path, _written: int) -> Api:
    """A cluster that was made anew has another certificate and other tokens."""
    return Api(kubeconfig)
