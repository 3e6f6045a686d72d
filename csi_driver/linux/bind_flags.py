"""The mount options that a bind can honour, from mount(8)'s words to the kernel's bits.

A bind has attributes of its own but no filesystem: `hard`, `vers=4.2` or `discard` belong to the mount below it, and silently
dropping them would be a lie. So exactly the words of the table are accepted and everything else is refused by name.

`bind` and `rbind` are refused too: that it is a bind is not the user's choice, and `rbind` would hand out other mounts that happen
to lie below the volume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from csi_driver.errors import InvalidArgument
from csi_driver.linux import mount_api

_TIGHTENING = {
    "ro": mount_api.MOUNT_ATTR_RDONLY,
    "nosuid": mount_api.MOUNT_ATTR_NOSUID,
    "nodev": mount_api.MOUNT_ATTR_NODEV,
    "noexec": mount_api.MOUNT_ATTR_NOEXEC,
    "nodiratime": mount_api.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": mount_api.MOUNT_ATTR_NOSYMFOLLOW,
}
_ACCESS_TIMES = {
    "noatime": mount_api.MOUNT_ATTR_NOATIME,
    "relatime": mount_api.MOUNT_ATTR_RELATIME,
    "strictatime": mount_api.MOUNT_ATTR_STRICTATIME,
}
# Words that ask for what is so anyway. They set nothing, because a bind never loosens what it is a bind of.
_DEFAULTS = ("rw", "suid", "dev", "exec", "diratime", "symfollow", "atime")
_CONTRADICTIONS = (
    {"ro", "rw"},
    {"nosuid", "suid"},
    {"nodev", "dev"},
    {"noexec", "exec"},
    {"nodiratime", "diratime"},
    {"nosymfollow", "symfollow"},
    {"noatime", "atime"},
    set(_ACCESS_TIMES),
)
_ALLOWED = "one of " + ", ".join((*_TIGHTENING, *_ACCESS_TIMES, *_DEFAULTS))


@dataclass(frozen=True, slots=True)
class MountAttributes:
    """What a bind forbids, beyond what the mount below it does. `access_times` None leaves that as it is there."""

    read_only: bool = False
    nosuid: bool = False
    nodev: bool = False
    noexec: bool = False
    nodiratime: bool = False
    nosymfollow: bool = False
    access_times: Literal["noatime", "relatime", "strictatime"] | None = None

    def words(self) -> frozenset[str]:
        """Say it in mount(8)'s words."""
        asked = {
            "ro": self.read_only,
            "nosuid": self.nosuid,
            "nodev": self.nodev,
            "noexec": self.noexec,
            "nodiratime": self.nodiratime,
            "nosymfollow": self.nosymfollow,
        }
        times = {self.access_times} if self.access_times else set[str]()
        return frozenset({word for word, is_asked in asked.items() if is_asked} | times)

    def kernel_bits(self) -> tuple[int, int]:
        """Say it in MOUNT_ATTR_* bits: those to set, and those to clear before (mount_setattr(2))."""
        bits = sum((_TIGHTENING | _ACCESS_TIMES)[word] for word in self.words())
        # The access times are a number in a field, not flags: the kernel wants the whole field cleared.
        return bits, mount_api.MOUNT_ATTR__ATIME if self.access_times else 0


def parse_bind_flags(flags: Sequence[str], field: str) -> MountAttributes:
    """Parse mount flags for a bind, one word each. `field` is what the message calls them.

    Raises InvalidArgument for a word that a bind cannot honour (so also for several in one: commas, white space, quotes), and for
    words that contradict each other. Repeating one is harmless.
    """
    for index, flag in enumerate(flags):
        if flag not in _TIGHTENING and flag not in _ACCESS_TIMES and flag not in _DEFAULTS:
            # The value of a flag may be secret (CSI spec, VolumeCapability.MountVolume).
            shown = flag.partition("=")[0] + "=…" if "=" in flag else flag
            raise InvalidArgument.field(f"{field}[{index}]", shown, f"a bind mount can honour {_ALLOWED}")
        for group in _CONTRADICTIONS:
            earlier = [word for word in flags[:index] if word in group and word != flag]
            if flag in group and earlier:
                raise InvalidArgument.field(f"{field}[{index}]", flag, f"contradicts {earlier[0]}; allowed is {_ALLOWED}")
    given = set(flags)
    times: list[Literal["noatime", "relatime", "strictatime"]] = ["noatime", "relatime", "strictatime"]
    return MountAttributes(
        read_only="ro" in given,
        nosuid="nosuid" in given,
        nodev="nodev" in given,
        noexec="noexec" in given,
        nodiratime="nodiratime" in given,
        nosymfollow="nosymfollow" in given,
        access_times=next((word for word in times if word in given), None),
    )
