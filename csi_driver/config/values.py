"""The words of the configuration, one by one: text in, a value out, or a ConfigError that says what is allowed.

Flags, environment and `pools.toml` all come through here, so a socket path or a server is judged by one rule wherever it is written.
"""

import ipaddress
import json
import os
import re
from fractions import Fraction
from pathlib import Path

MAX_SOCKET_PATH_BYTES = 107  # sun_path of unix(7) is 108 bytes with its NUL
MAX_NODE_ID_BYTES = 256
MAX_BYTES = 2**63 - 1  # sizes are int64 in CSI

_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_DRIVER_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_POOL_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?")
_HOST_NAME = re.compile(rf"(?i:{_LABEL}(\.{_LABEL})*)")
_INTERFACE = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,14}")
_MOUNT_OPTION = re.compile(r"""(?!-)((?![,"'`\\])[!-~])+""")
_QUANTITY = re.compile(r"([1-9][0-9]{0,18})(|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)", re.ASCII)
_FACTORS = {unit: 1000**power for power, unit in enumerate(("", "k", "M", "G", "T", "P", "E"))} | {
    unit: 1024**power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)
}
_PERCENT = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,6})?)%", re.ASCII)
_NODE_ID = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")


class ConfigError(Exception):
    """The configuration cannot be used. `problems` holds one line per mistake; the text is those lines."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def parse_endpoint(text: str) -> Path:
    """Return the path of the Unix socket that `unix:///x/csi.sock` or `/x/csi.sock` names.

    Raises ConfigError for anything else. TCP is refused: CSI has no authentication of its own, and whoever can connect can mount.
    """
    if "://" in text and not text.startswith("unix://"):
        raise ConfigError(
            "only Unix sockets are served (unix:///csi/csi.sock): CSI has no authentication, so a network port would let anybody mount"
        )
    path = text.removeprefix("unix://") if text.startswith("unix://") else text.removeprefix("unix:")
    if not path.startswith("/"):
        raise ConfigError("must be unix:// and an absolute path, so three slashes: unix:///csi/csi.sock")
    if path.endswith("/"):
        raise ConfigError("must name a socket, not a directory")
    socket = parse_directory(path)
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"the path of a Unix socket has at most {MAX_SOCKET_PATH_BYTES} bytes (unix(7))")
    return socket


def parse_metrics_address(text: str) -> tuple[str, int]:
    """Return (host, port) of `HOST:PORT`, `:PORT` (host "": every address) or `[IPv6]:PORT` (host without brackets).

    Port 0 asks the kernel for a free one. Raises ConfigError for anything else.
    """
    allowed = "must be HOST:PORT, :PORT or [IPv6]:PORT, with a port from 0 to 65535"
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigError(allowed)
    if not host:
        return "", int(port)
    try:
        return parse_server(host).strip("[]"), int(port)
    except ConfigError as error:
        raise ConfigError(allowed) from error


def parse_node_id(text: str) -> str:
    """Return the name of this node as Kubernetes writes node names (and hosts write theirs), at most 253 characters.

    `@` and the node's address may follow: NFS servers know nodes by it, and it is found out where it is not given.
    """
    name, at, address = text.partition("@")
    if not _NODE_ID.fullmatch(name):
        raise ConfigError("must be 1 to 253 letters, digits, '-', '.' or '_', beginning and ending with a letter or digit")
    if at and not any(_is_address(address, kind) for kind in (ipaddress.IPv4Address, ipaddress.IPv6Address)):
        raise ConfigError("must have an IPv4 or IPv6 address behind '@', such as node-1@10.0.0.7")
    if len(text) > MAX_NODE_ID_BYTES:
        raise ConfigError(f"must have at most {MAX_NODE_ID_BYTES} characters (CSI spec, NodeGetInfoResponse.node_id)")
    return text


def parse_directory(text: str) -> Path:
    """Return an absolute path without `..`, with doubled and trailing slashes removed; never `/` itself."""
    path = parse_server_path(text)
    if path == Path("/"):
        raise ConfigError("must be a directory of its own, not /")
    return path


def parse_server_path(text: str) -> Path:
    """Return a path like `parse_directory`, but allow `/`: the root of an NFSv4 server's exports (exports(5), fsid=0)."""
    if not text.startswith("/"):
        raise ConfigError("must be an absolute path")
    if not text.isprintable():
        raise ConfigError("must not contain control characters or others that cannot be seen")
    components = [component for component in text.split("/") if component not in ("", ".")]
    if ".." in components:
        raise ConfigError("must not contain '..'")
    # NAME_MAX is 255; PATH_MAX is 4096, of which most is left to what will be below the pool.
    if any(len(component.encode()) > 255 for component in components) or len(text.encode()) > 1024:
        raise ConfigError("must have at most 1024 bytes, and 255 between two slashes")
    return Path("/" + "/".join(components))


def parse_server(text: str) -> str:
    """Return the address of an NFS server as nfs(5) writes it: a host name, an IPv4 address or an IPv6 address in brackets."""
    if text.startswith("[") and text.endswith("]"):
        address, percent, interface = text[1:-1].partition("%")
        if _is_address(address, ipaddress.IPv6Address) and (not percent or _INTERFACE.fullmatch(interface)):
            return text
    elif _is_address(text, ipaddress.IPv4Address) or _is_host_name(text):
        return text
    raise ConfigError("must be a host name, an IPv4 address or an [IPv6] address")


def parse_mount_option(text: str) -> str:
    """Return one mount option. The kernel's option list has no quoting, so whatever could end an option is refused."""
    if not _MOUNT_OPTION.fullmatch(text):
        raise ConfigError(
            "each option is printable ASCII without ',', white space, quotes or backslash, and does not begin with '-'"
        )
    return text


def parse_driver_name(text: str) -> str:
    """Return a CSI driver name (CSI spec, GetPluginInfo: at most 63 characters), which is also a Kubernetes object's name."""
    if len(text) > 63 or not _DRIVER_NAME.fullmatch(text):
        raise ConfigError(
            "must be a lower-case domain name (RFC 1123 subdomain) of at most 63 characters, such as hostpath.csi.tatami.dev"
        )
    return text


def parse_pool_name(text: str) -> str:
    """Return a pool's name. It has no dots because volume handles are `<pool>.<id>`."""
    if not _POOL_NAME.fullmatch(text):
        raise ConfigError("a pool's name is 1 to 32 of a-z, 0-9 and '-', beginning and ending with a letter or digit")
    return text


def parse_quantity(text: str) -> int:
    """Return the bytes of a whole Kubernetes quantity (resource.Quantity), such as `500Gi`, `2T` or `1048576`: 1 to 2**63 - 1."""
    match = _QUANTITY.fullmatch(text)
    size = int(match[1]) * _FACTORS[match[2]] if match else 0
    if not 0 < size <= MAX_BYTES:
        raise ConfigError("a whole Kubernetes quantity such as `100Mi` or `1Gi`")
    return size


def parse_percent(text: str) -> Fraction | None:
    """Return the share that `5%` or `2.5%` names, from 0 to less than 1; None for what is no percentage."""
    match = _PERCENT.fullmatch(text)
    return Fraction(match[1]) / 100 if match else None


def _is_host_name(text: str) -> bool:
    # A name whose last label is a number is a mistyped IPv4 address, never a host (RFC 1123, section 2.1).
    return bool(_HOST_NAME.fullmatch(text)) and len(text) <= 253 and not text.rpartition(".")[2].isdecimal()


def _is_address(text: str, kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def shown(value: object) -> str:
    """Show a value as TOML would write it: one line of about 80 characters, without what a terminal would obey."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (RecursionError, ValueError):
        text = f"({type(value).__name__})"
    text = text if len(text) <= 80 else text[:80] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
