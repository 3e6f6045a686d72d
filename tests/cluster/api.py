"""Reads of the Kubernetes API over a connection that stays, for what is asked again and again.

Waiting means asking several times a second, and a kubectl for each question would keep this machine busier than the cluster does.
"""

import base64
import http.client
import json
import ssl
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

Object = dict[str, Any]
_SECONDS = 30


class ApiError(RuntimeError):
    """The API answered with another status than 200; the text is what it said."""


class NotThere(ApiError):
    """404: there is no such object, or no such kind."""


class Api:
    """The API as the user of a kubeconfig. A connection for each thread."""

    def __init__(self, kubeconfig: Path) -> None:
        document = json.loads(kubeconfig.read_text())
        cluster = document["clusters"][0]["cluster"]
        server = urlsplit(cluster["server"])
        self._address = (server.hostname or "", server.port or 443)
        self._headers = {"Authorization": f"Bearer {document['users'][0]['user']['token']}", "Accept": "application/json"}
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._trust = ssl.create_default_context(cadata=authority)
        self._threads = threading.local()
        self._kinds: dict[str, tuple[str, bool]] = {}

    def path(self, kind: str, namespace: str) -> str:
        """Return where objects of a kind lie; `kind`: its plural, singular or short name, in any case. Raises NotThere."""
        if kind.lower() not in self._kinds:
            self._discover()
        try:
            base, namespaced = self._kinds[kind.lower()]
        except KeyError:
            raise NotThere(f"the cluster has no kind {kind}") from None
        place, _, plural = base.rpartition("/")
        return f"{place}/namespaces/{quote(namespace)}/{plural}" if namespaced else base

    def read(self, path: str) -> Any:
        """GET. Raises NotThere, ApiError, OSError."""
        try:
            return self._read(path)
        except (http.client.HTTPException, ConnectionError):
            self._threads.connection.close()  # the server had closed it meanwhile; a GET may be asked again
            return self._read(path)

    def _read(self, path: str) -> Any:
        if not hasattr(self._threads, "connection"):
            self._threads.connection = http.client.HTTPSConnection(*self._address, timeout=_SECONDS, context=self._trust)
        connection = self._threads.connection
        connection.request("GET", path, headers=self._headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            kind = NotThere if answer.status == 404 else ApiError
            raise kind(f"GET {path}: {answer.status} {body.decode(errors='replace')[:500]}")
        return json.loads(body)

    def _discover(self) -> None:
        groups = [f"/apis/{group['preferredVersion']['groupVersion']}" for group in self.read("/apis")["groups"]]
        for place in [*reversed(groups), "/api/v1"]:  # the core's last: its names win
            for item in self.read(place)["resources"]:
                if "/" not in item["name"]:
                    for name in (item["name"], item["singularName"], item["kind"].lower(), *item.get("shortNames", [])):
                        self._kinds[name] = (f"{place}/{item['name']}", item["namespaced"])
