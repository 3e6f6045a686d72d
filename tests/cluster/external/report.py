"""What a run of the suite came to, from ginkgo's JSON report: counts, failures, and every skip with its reason.

Ginkgo calls two things skipped: specs that nobody selected, which have no message, and specs that ran and gave up with one. Only the
latter are skips here. A message that `WHY` does not know is an error of the run: someone has to say whether it hides a defect.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_OURS = "not a capability of ours"
NOT_HERE = "cannot be had here"
NOT_MEANT = "the suite leaves it to another of its specs, or has none for such a driver"
UNKNOWN = "NOT EXPLAINED"

WHY: tuple[tuple[str, str, str], ...] = (
    (r"volume type .?\"?(InlineVolume|PreprovisionedPV)", NOT_MEANT, "volumes of drivers that are compiled into Kubernetes"),
    (r"skipping PreprovisionedPV pattern", NOT_MEANT, "volumes of drivers that are compiled into Kubernetes"),
    (r"volume type \"\w*\" is (not )?ephemeral", NOT_MEANT, "each pattern has its own of a pair of specs"),
    (r"Suite \"\w+\" does not support", NOT_MEANT, "the suite has no such volumes"),
    (r"does not support \w+ volumes? type", NOT_MEANT, "the suite has no such volumes"),
    (r"should be covered by block volume case", NOT_MEANT, "one of two volume modes is enough"),
    (r"non-filesystem volume mode|Block volumes do not support mount options|for [Bb]lock (mode|volumes? )", NOT_MEANT, "raw block has no files"),
    (r"raw block volumes cannot be read-only|not valid for Block volume mode", NOT_MEANT, "raw block has no files"),
    (r"supports VolumeMountGroup, which is incompatible", NOT_MEANT, "the driver applies fsGroup itself, and the spec is for kubelets that do"),
    (r"only supports singleNodeVolume|No topology with at least 2 nodes", NOT_OURS, "a volume of a node's disk is on that node only"),
    (r"support (RWX|ROX|capReadOnlyMany)", NOT_OURS, "a volume of a node's disk has no multi-node modes"),
    (r"support topology|provide topology keys", NOT_OURS, "every node reaches every volume"),
    (r"support group ?snapshots|groupsnapshotting|group snapshot stress", NOT_OURS, "external-snapshotter makes none per node"),
    (r"VolumeAttributesClass|volume modify stress", NOT_OURS, "external-resizer modifies no volumes per node"),
    (r"support snapshot metadata", NOT_OURS, "there is no changed block tracking"),
    (r"support SELinuxMount", NOT_OURS, "mounts of one pool share a filesystem, and so a context"),
    (r"support (block|Block|raw block)|doesn't support Block", NOT_OURS, "raw block"),
    (r"does(n't| not) support \"?(ext[234]|xfs|ntfs)|Distro .* support", NOT_OURS, "a directory has the filesystem of its pool"),
    (r"WaitForFirstConsumer binding mode", NOT_MEANT, "a spec for classes that bind at once"),
    (r"immediate is not compatible|ephemeral volumes with immediate binding", NOT_MEANT, "a spec for classes without topology"),
    (r"requires to deploy on a specific node|Number of available nodes", NOT_HERE, "more nodes than this cluster has"),
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One spec that was selected: its name, `passed`, `skipped` or how else it ended, seconds, and what it said."""

    name: str
    state: str
    seconds: float
    message: str


@dataclass(frozen=True)
class Run:
    """A whole run: the specs that were selected, seconds of wall time, and why ginkgo gave up where it did."""

    specs: tuple[Spec, ...]
    seconds: float
    broken: tuple[str, ...]

    def those(self, *states: str) -> list[Spec]:
        """Return the specs that ended so."""
        return [spec for spec in self.specs if spec.state in states]

    @property
    def failed(self) -> list[Spec]:
        """The specs that neither passed nor were skipped: failed, timed out, panicked, interrupted, aborted."""
        return [spec for spec in self.specs if spec.state not in ("passed", "skipped", "pending")]

    @property
    def unexplained(self) -> list[Spec]:
        """The skips whose message nobody has judged."""
        return [spec for spec in self.those("skipped") if why(spec.message)[0] == UNKNOWN]

    @property
    def is_good(self) -> bool:
        """Whether all is well: something passed, nothing failed, every skip is explained."""
        return bool(self.those("passed")) and not (self.failed or self.unexplained or self.broken)


def read(report: Path) -> Run:
    """Read ginkgo's JSON report. Raises ValueError or OSError where there is none."""
    suites: list[dict[str, Any]] = json.loads(report.read_text())
    specs = tuple(_spec(one) for suite in suites for one in suite["SpecReports"] or () if _was_selected(one))
    seconds = sum(suite["RunTime"] for suite in suites) / 1e9
    broken = tuple(reason for suite in suites for reason in suite.get("SpecialSuiteFailureReasons") or ())
    return Run(specs, seconds, broken)


def why(message: str) -> tuple[str, str]:
    """Return the kind of a skip and its reason in our words; UNKNOWN and the suite's own words where it is not in the list."""
    for pattern, kind, reason in WHY:
        if re.search(pattern, message):
            return kind, reason
    return UNKNOWN, message


def table(backend: str, run: Run) -> str:
    """Return what is printed at the end of a run."""
    passed, skipped = len(run.those("passed")), len(run.those("skipped"))
    lines = [
        f"{'backend':18} {'selected':>8} {'run':>6} {'passed':>6} {'failed':>6} {'skipped':>7} {'minutes':>7}",
        f"{backend:18} {len(run.specs):8} {len(run.specs) - skipped:6} {passed:6} {len(run.failed):6} {skipped:7} {run.seconds / 60:7.1f}",
    ]
    lines += [f"\nfailed: {spec.name}\n  {_first_line(spec.message)}" for spec in run.failed]
    lines += [f"\nthe suite: {reason}" for reason in run.broken]
    return "\n".join([*lines, "", *_skips(run.those("skipped"))])


def _skips(specs: Iterable[Spec]) -> list[str]:
    counted = Counter(why(spec.message) for spec in specs)
    lines = []
    for kind in (UNKNOWN, NOT_HERE, NOT_OURS, NOT_MEANT):
        reasons = {reason: count for (found, reason), count in counted.items() if found == kind}
        if reasons:
            lines.append(f"skipped, {kind}: {sum(reasons.values())}")
            lines += [f"  {count:4}  {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])]
    return lines


def _was_selected(spec: dict[str, Any]) -> bool:
    if spec["LeafNodeType"] != "It":
        # What goes on around the specs is reported only where it broke.
        return spec["State"] not in ("passed", "skipped")
    return spec["State"] not in ("skipped", "pending") or "Failure" in spec


def _spec(one: dict[str, Any]) -> Spec:
    texts = [*(one["ContainerHierarchyTexts"] or ()), one["LeafNodeText"] or one["LeafNodeType"]]
    return Spec(" ".join(texts), one["State"], one["RunTime"] / 1e9, one.get("Failure", {}).get("Message", ""))


def _first_line(message: str) -> str:
    return next((line for line in message.splitlines() if line.strip()), "")[:300]
