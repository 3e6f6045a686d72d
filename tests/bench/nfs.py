"""NFS: the speed tests of tests/uml, in a guest with a real server and client, and what they measured side by side."""

import json
import os
import sys
from pathlib import Path

UML = Path(__file__).resolve().parents[1] / "uml"
GROUP = "tests/uml/guest_tests/nfs_speed"
MARK = "FIGURE "
FILES, MEBIBYTES = 10_000, 1024


def measure(scale: float) -> dict[str, float]:
    """Boot a guest, run the group, and return its figures: seconds of ours and of theirs, by what was done."""
    sys.path.insert(0, str(UML))
    import guest

    guest.install()
    guest.remove_leftovers()
    os.environ["TATAMI_SPEED_FILES"] = str(max(100, int(FILES * scale)))
    os.environ["TATAMI_SPEED_MIB"] = str(max(32, int(MEBIBYTES * scale)))
    figures: dict[str, float] = {}
    console = []
    with guest.Guest(guest.pytest_job(["-s", GROUP], timeout=1800)) as booted:
        for line in booted.follow():
            console.append(line)
            if MARK in line:  # behind the name of the test that pytest prints
                figures |= json.loads(line.partition(MARK)[2])
        booted.exit_code()  # a target that was missed is told by `judge`; GuestDied says the rest
    if not figures:
        raise RuntimeError("the guest measured nothing:\n" + "\n".join(console[-60:]))
    return figures


def judge(figures: dict[str, float]) -> list[tuple[str, float, float]]:
    """Return (sentence, measured, target); measured must not exceed the target."""
    verdicts = []
    if "small files: clone" in figures:
        verdicts.append(
            ("NFS, small files 1 ms away: clone / cp -a", figures["small files: clone"] / figures["small files: cp -a"], 1 / 3)
        )
    for kind in ("snapshot", "restore", "clone"):
        if f"large: {kind}" in figures:
            beyond = figures[f"large: {kind}"] - figures[f"8 bytes: {kind}"]
            verdicts.append((f"NFS, 1 GiB: {kind} beyond that of 8 bytes, seconds", beyond, 0.2))
    if "create and delete" in figures:
        ratio = figures["create and delete"] / figures["create and delete, a mount for each"]
        verdicts.append(("NFS: create and delete / a mount for each call", ratio, 1 / 5))
    return verdicts
