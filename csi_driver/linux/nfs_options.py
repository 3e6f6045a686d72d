"""NFS mount options: known ones only, joined from the pool, the class and the volume, in this order.

The kernel takes one string with commas and has no quoting, so an option is taken apart, looked up, and put together anew: what is
not in the tables below reaches no mount. Later sources win, as they do in the kernel; but what a pool forbids (`nosuid`, `ro` ...)
no later source allows again, and where a mount leads to is the pool's word alone: no class and no volume names an address or a port.

Messages show an option's name and never its value: those of a volume may be secret (CSI spec, VolumeCapability.MountVolume).
The names are nfs(5)'s of nfs-utils 2.6 and the kernel's up to 6.x (`xprtsec` needs Linux 6.5, `softerr` 5.2, `nconnect` 5.3).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from csi_driver.errors import InvalidArgument, quoted
from csi_driver.linux.bind_flags import MountAttributes, parse_bind_flags

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%/@\[\]+-]{0,127}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")


@dataclass(frozen=True, slots=True)
class NfsOption:
    """One option. Of two with the same `kind` the later one wins; `value` None for a word alone."""

    name: str
    value: str | None
    kind: str

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


@dataclass(frozen=True, slots=True)
class _Values:
    """What an option may be set to."""

    allowed: str
    check: Callable[[str], bool]


def _one_of(*words: str) -> _Values:
    return _Values("one of " + ", ".join(words), words.__contains__)


def _number(least: int, most: int) -> _Values:
    def check(value: str) -> bool:
        return bool(_NUMBER.fullmatch(value)) and least <= int(value) <= most

    return _Values(f"a number from {least} to {most}", check)


_SECONDS = _number(0, 86400)
_BYTES = _number(1024, 16 * 1024 * 1024)
_PORT = _number(0, 65535)
_PROTOCOLS = _one_of("tcp", "tcp6", "udp", "udp6", "rdma", "rdma6")
_ADDRESS = _Values("an address or a host name", lambda value: bool(_WORD.fullmatch(value)))

# Words alone, by what they decide: words of one group exclude each other.
_GROUPS: tuple[tuple[str, ...], ...] = (
    ("hard", "soft", "softerr"),
    ("ac", "noac"),
    ("cto", "nocto"),
    ("lock", "nolock"),
    ("acl", "noacl"),
    ("rdirplus", "nordirplus"),
    ("sharecache", "nosharecache"),
    ("resvport", "noresvport"),
    ("migration", "nomigration"),
    ("posix", "noposix"),
    ("sync", "async"),
    ("noatime", "relatime", "strictatime", "atime"),
    ("ro", "rw"),
    ("nosuid", "suid"),
    ("nodev", "dev"),
    ("noexec", "exec"),
    ("nodiratime", "diratime"),
    ("fsc", "nofsc"),
)
# They ask for what is so unless something forbids it, so they are taken and set nothing: nobody loosens a pool.
_DEFAULTS = frozenset({"rw", "suid", "dev", "exec", "diratime", "atime"})
_GENERIC = frozenset(
    {"ro", "nosuid", "nodev", "noexec", "nodiratime", "noatime", "relatime", "strictatime"} | _DEFAULTS
)  # a bind of the mount has these, too
_SETTINGS: dict[str, _Values] = {
    "vers": _one_of("3", "4", "4.0", "4.1", "4.2"),
    "nfsvers": _one_of("3", "4", "4.0", "4.1", "4.2"),
    "proto": _PROTOCOLS,
    "mountproto": _one_of("tcp", "tcp6", "udp", "udp6"),
    "mountvers": _number(1, 3),
    "sec": _Values(
        "sys, krb5, krb5i or krb5p, several of them with `:` between",
        lambda value: all(flavor in ("sys", "krb5", "krb5i", "krb5p") for flavor in value.split(":")),
    ),
    "xprtsec": _one_of("none", "tls", "mtls"),
    "timeo": _number(1, 6000),
    "retrans": _number(0, 100),
    "nconnect": _number(1, 16),
    "max_connect": _number(1, 16),
    "rsize": _BYTES,
    "wsize": _BYTES,
    "acregmin": _SECONDS,
    "acregmax": _SECONDS,
    "acdirmin": _SECONDS,
    "acdirmax": _SECONDS,
    "actimeo": _SECONDS,
    "lookupcache": _one_of("all", "none", "pos", "positive"),
    "local_lock": _one_of("all", "flock", "posix", "none"),
    "write": _one_of("lazy", "eager", "wait"),
    "fsc": _Values("a word", lambda value: bool(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value))),
}
# Where the mount leads to, or from where it comes.
_POOLS_ALONE: dict[str, _Values] = {"port": _PORT, "mountport": _PORT, "clientaddr": _ADDRESS}
_NODES_ALONE = frozenset({"ro", "ac", "noac", "actimeo", "fsc", "nofsc", "nocto", "local_lock"})
"""What is for the mounts of volumes and not for the controller's own."""
_REFUSED = {
    "addr": "the pool says where the server is",
    "mountaddr": "the pool says where the server is",
    "mounthost": "the pool says where the server is",
    "source": "the pool says what is mounted",
    "bg": "a mount in the background would be said to be there before it is",
    "fg": "mounts are always made in the foreground",
    "retry": "a mount is tried once; whoever asked asks again",
    "remount": "a mount is never changed under its users",
    "bind": "an NFS mount is no bind mount",
    "sharecache": "the kubelet would take each volume of a share for another place of the others, and let go of none of them",
}
_KINDS = {word: group[0] for group in _GROUPS for word in group} | {"nfsvers": "vers"}
_WORDS = frozenset(word for group in _GROUPS for word in group) - set(_REFUSED)
_KNOWN = sorted(_WORDS | set(_SETTINGS) | set(_POOLS_ALONE))


def parse_nfs_options(words: Sequence[str], field: str, *, of_pool: bool = False) -> tuple[NfsOption, ...]:
    """Parse one source's options, one in each word; `field` is what messages call it, `of_pool` allows what is a pool's alone.

    Raises InvalidArgument for an option that is unknown, has a value that it cannot have, or contradicts another of this source.
    """
    parsed: list[NfsOption] = []
    for index, word in enumerate(words):
        option = _parse(word, f"{field}[{index}]", of_pool=of_pool)
        for earlier in parsed:
            if earlier.kind == option.kind and earlier != option:
                raise InvalidArgument(f"{field}[{index}] is {quoted(option.name)}: it contradicts `{earlier.name}` before it")
        parsed.append(option)
    return tuple(dict.fromkeys(parsed))


def join_options(*sources: Iterable[NfsOption]) -> tuple[NfsOption, ...]:
    """Join the options of several sources, the later ones winning; each kind is there once, what forbids nothing is left out."""
    joined: dict[str, NfsOption] = {}
    for source in sources:
        for option in source:
            if option.name not in _DEFAULTS:
                joined.pop(option.kind, None)  # at the later place: `actimeo` after `acregmin` is another thing than before it
                joined[option.kind] = option
    return tuple(joined.values())


def render_options(options: Iterable[NfsOption]) -> str:
    """Say the options as mount.nfs(8) takes them behind `-o`; "rw" where there are none, because it wants some."""
    return ",".join(map(str, options)) or "rw"


def bind_attributes(words: Sequence[str], field: str) -> MountAttributes:
    """Return what of a volume's mount flags a bind of its mount has as well. Raises InvalidArgument as `parse_nfs_options` does."""
    names = [option.name for option in parse_nfs_options(words, field) if option.name in _GENERIC]
    return parse_bind_flags(tuple(names), field)


def share_options(pool: Iterable[NfsOption]) -> tuple[NfsOption, ...]:
    """Return the options for the controller's own mount of a pool's share.

    `softerr` with timeo 10 s and retrans 2 gives ETIMEDOUT after half a minute of silence (TCP's back-off is linear: nfs(5)), where
    a thread would hang for ever; whatever is written is synced and its errors are looked at, so that an error is a failed call and
    no lie. Names are asked for each time and a missing one is never remembered, because other controllers make records, too; for the
    same reason files are asked for when they are opened (no `nocto`), and locks are the server's (no `local_lock`).
    """
    own = ["softerr", "timeo=100", "retrans=2", "nosuid", "nodev", "noexec", "lookupcache=positive"]
    own += ["acregmin=1", "acregmax=1", "acdirmin=0", "acdirmax=0"]
    kept = [option for option in pool if option.name not in _NODES_ALONE]
    return join_options(kept, parse_nfs_options(own, "share"))


def volume_options(*sources: Iterable[NfsOption]) -> tuple[NfsOption, ...]:
    """Return the options for a node's mount of one volume: those of the sources, joined, and a superblock of its own.

    Mounts of one share have one superblock, and mountinfo shows `/` as the root of each of them, whatever its directory
    (nfs_show_path() in fs/nfs/super.c). The kubelet compares device and root (SearchMountPoints() in k8s.io/mount-utils): it would
    take each volume for another mount of the others, and wait with NodeUnstageVolume until the others are gone. They wait, too.
    """
    return join_options(*sources, (NfsOption("nosharecache", None, _KINDS["nosharecache"]),))


def retry_once() -> NfsOption:
    """Return the option that makes mount.nfs(8) give up at the first failure, instead of trying for two minutes."""
    return NfsOption("retry", "0", "retry")


def _parse(word: str, field: str, *, of_pool: bool) -> NfsOption:
    name, equals, value = word.partition("=")
    if not re.fullmatch(r"[a-z0-9_]{1,32}", name, re.ASCII):
        raise InvalidArgument.field(
            field, name, "an option's name is lower-case letters, digits and `_`; give each option by itself"
        )
    if name in _REFUSED:
        raise InvalidArgument.field(field, name, f"not allowed: {_REFUSED[name]}")
    if name in _POOLS_ALONE and not of_pool:
        raise InvalidArgument.field(field, name, "only the pool (`options` in pools.toml) may say where the server is")
    values = _POOLS_ALONE.get(name) or _SETTINGS.get(name)
    if not equals and name in _WORDS:
        return NfsOption(name, None, _KINDS[name])
    if values is None:
        if name in _WORDS:
            raise InvalidArgument.field(field, name, "it takes no value")
        near = get_close_matches(name, _KNOWN, n=1)
        meant = f"did you mean `{near[0]}`? " if near else ""
        raise InvalidArgument.field(field, name, f"no known NFS mount option; {meant}known are {', '.join(_KNOWN)}")
    if not equals or not _WORD.fullmatch(value) or not values.check(value):
        raise InvalidArgument.field(field, name + "=…" if equals else name, f"it must be set to {values.allowed}")
    return NfsOption(name, value, _KINDS.get(name, name))
