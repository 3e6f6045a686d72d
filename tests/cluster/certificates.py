"""The cluster's certificates and tokens, made anew for each cluster and gone with its directory."""

import base64
import json
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cluster.layout import API_PORT, API_SERVICE, GATEWAY, STATE

DIRECTORY = STATE / "pki"
TOKENS = DIRECTORY / "tokens.csv"
DAYS = "365"


def make(users: Mapping[str, str]) -> None:
    """Make a CA, the API server's certificates, the service accounts' key, and a token for each of `users` (user -> group)."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    DIRECTORY.chmod(0o700)
    _openssl(
        "req", "-x509", *_key("ca"), "-subj", "/CN=tatami-cluster", "-addext", "keyUsage=critical,keyCertSign,digitalSignature"
    )
    names = f"subjectAltName=IP:{GATEWAY},IP:{API_SERVICE},DNS:kubernetes.default.svc,DNS:kubernetes.default"
    _openssl("req", "-x509", *_ca(), *_key("apiserver"), "-subj", "/CN=kube-apiserver", "-addext", names, *_leaf())
    # Who fetches logs and runs commands in containers: the kubelet asks for it.
    _openssl("req", "-x509", *_ca(), *_key("kubelet-client"), "-subj", "/O=system:masters/CN=kubelet-client", *_leaf())
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "service-accounts.key")
    _openssl("pkey", "-in", "service-accounts.key", "-pubout", "-out", "service-accounts.pub")
    lines = [f'{secrets.token_hex(16)},{user},{user},"{group}"\n' for user, group in users.items()]
    TOKENS.write_text("".join(lines))
    TOKENS.chmod(0o600)


def kubeconfig(user: str, path: Path) -> Path:
    """Write a kubeconfig for one of the users that `make` knew."""
    token = next(line.split(",")[0] for line in TOKENS.read_text().splitlines() if line.split(",")[1] == user)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "tatami",
                "cluster": {
                    "server": f"https://{GATEWAY}:{API_PORT}",
                    "certificate-authority-data": _encoded(DIRECTORY / "ca.crt"),
                },
            }
        ],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [{"name": "tatami", "context": {"cluster": "tatami", "user": user}}],
        "current-context": "tatami",
    }
    path.write_text(json.dumps(document, indent=1))
    path.chmod(0o600)
    return path


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _key(name: str) -> list[str]:
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"]
    return [*kind, "-keyout", f"{name}.key", "-out", f"{name}.crt", "-days", DAYS]


def _ca() -> list[str]:
    return ["-CA", "ca.crt", "-CAkey", "ca.key"]


def _leaf() -> list[str]:
    return ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "extendedKeyUsage=serverAuth,clientAuth"]


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], cwd=DIRECTORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr}")
