"""What a run of the suite came to, from ginkgo's JSON report: counts, failures, and every skip with its reason.

Ginkgo calls two things skipped: specs that nobody selected, which have no message, and specs that ran and gave up with one. Only the
latter are skips here. A message that `WHY` does not know is an error of the run: someone has to say whether it hides a defect.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_OURS = "not a capability of ours"
NOT_HERE = "cannot be had here"
NOT_MEANT = "the suite leaves it to another of its specs, or has none for such a driver"
UNKNOWN = "NOT EXPLAINED"

WHY: tuple[tuple[str, str, str], ...] = (
    (r"volume type .?\"?(InlineVolume|PreprovisionedPV)", NOT_MEANT, "volumes of drivers that are compiled into Kubernetes"),
    (r"volume type \"CSIInlineVolume\"", NOT_OURS, "inline volumes are directories"),
    (r"skipping PreprovisionedPV pattern", NOT_MEANT, "volumes of drivers that are compiled into Kubernetes"),
    (r"volume type \"\w*\" is (not )?ephemeral", NOT_MEANT, "each pattern has its own of a pair of specs"),
    (r"Suite \"\w+\" does not support", NOT_MEANT, "the suite has no such volumes"),
    (r"does not support \w+ volumes? type", NOT_MEANT, "the suite has no such volumes"),
    (r"Skipping CSIInlineVolume test for expansion", NOT_MEANT, "an inline volume has no claim that could grow"),
    (r"should be covered by block volume case", NOT_MEANT, "one of two volume modes is enough"),
    (r"non-filesystem volume mode|Block volumes do not support mount options|for [Bb]lock (mode|volumes? )", NOT_MEANT, "raw block has no files"),
    (r"raw block volumes cannot be read-only|not valid for Block volume mode", NOT_MEANT, "raw block has no files"),
    (r"supports VolumeMountGroup, which is incompatible", NOT_MEANT, "the driver applies fsGroup itself, and the spec is for kubelets that do"),
    (r"only supports singleNodeVolume|No topology with at least 2 nodes", NOT_OURS, "a volume of a node's disk is on that node only"),
    (r"support (RWX|ROX|capReadOnlyMany)", NOT_OURS, "a volume of a node's disk, and an image, is on one node at a time"),
    (r"Not enough topologies in cluster", NOT_OURS, "every node with NFS reaches every volume"),
    (r"support topology|provide topology keys", NOT_OURS, "every node reaches every volume"),
    (r"support group ?snapshots|groupsnapshotting|group snapshot stress", NOT_OURS, "external-snapshotter makes none per node"),
    (r"VolumeAttributesClass|volume modify stress", NOT_OURS, "external-resizer modifies no volumes per node"),
    (r"support snapshot metadata", NOT_OURS, "there is no changed block tracking"),
    (r"support SELinuxMount", NOT_OURS, "mounts of one pool share a filesystem, and so a context"),
    (r"support (block|Block|raw block)|doesn't support Block", NOT_OURS, "raw block"),
    (r"support \"?ntfs|Distro .* support ntfs", NOT_MEANT, "Windows"),
    (r"support \"?(ext[234]|xfs)|Distro does not support xfs", NOT_OURS, "a directory has the filesystem of its pool, an image ext4 or xfs"),
    (r"WaitForFirstConsumer binding mode", NOT_MEANT, "a spec for classes that bind at once"),
    (r"immediate is not compatible|ephemeral volumes with immediate binding", NOT_MEANT, "a spec for classes without topology"),
    (r"support filesystem resizing", NOT_HERE, "`df` shows a directory's size only where its pool has project quotas"),
    (r"requires to deploy on a specific node|Number of available nodes", NOT_HERE, "more nodes than this cluster has"),
)  # fmt: skip


NEEDS_IMAGES = "any volume data source"
LEFT_OUT: tuple[tuple[str, str, str], ...] = (
    (NEEDS_IMAGES, NOT_HERE, "a volume populator that is published as an image only"),
    (
        r"\[Disruptive\]",
        NOT_HERE,
        "they stop the kubelet over ssh, as a service of systemd; the nodes of this cluster have neither",
    ),
    (r"\[Slow\]", "not asked for", "--labels '!Disruptive' runs the slow ones, too"),
)
"""Why specs are not selected at all, by their names, which have the labels in them."""


@dataclass(frozen=True)
class Spec:
    """One spec that was selected: its name, `passed`, `skipped` or how else it ended, seconds, and what it said."""

    name: str
    state: str
    seconds: float
    message: str


@dataclass(frozen=True)
class Run:
    """A whole run: the specs that were selected and those that were not, seconds of wall time, and why ginkgo gave up where it did."""

    specs: tuple[Spec, ...]
    left_out: tuple[Spec, ...]
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
    reports = [one for suite in suites for one in suite["SpecReports"] or ()]
    specs = tuple(_spec(one) for one in reports if _was_selected(one))
    left_out = tuple(_spec(one) for one in reports if _is_storage(one) and not _was_selected(one))
    seconds = sum(suite["RunTime"] for suite in suites) / 1e9
    broken = tuple(reason for suite in suites for reason in suite.get("SpecialSuiteFailureReasons") or ())
    return Run(specs, left_out, seconds, broken)


def why(message: str) -> tuple[str, str]:
    """Return the kind of a skip and its reason in our words; UNKNOWN and the suite's own words where it is not in the list."""
    for pattern, kind, reason in WHY:
        if re.search(pattern, message):
            return kind, reason
    return UNKNOWN, message


def table(runs: Mapping[str, Run], left_out: Iterable[tuple[str, str]] = ()) -> str:
    """Return what is printed at the end: a line for each run, failures, and why specs were skipped or not selected.

    `left_out`: regular expressions for names of specs that a backend cannot run here, each with the reason.
    """
    lines = [f"{'':28} {'selected':>8} {'run':>6} {'passed':>6} {'failed':>6} {'skipped':>7} {'minutes':>7}"]
    lines += [_row(name, [run]) for name, run in runs.items()]
    if len(runs) > 1:
        lines.append(_row("all", list(runs.values())))
    for name, run in runs.items():
        lines += [f"\n{name} failed: {spec.name}\n  {_first_line(spec.message)}" for spec in run.failed]
        lines += [f"\n{name}, the suite: {reason}" for reason in run.broken]
    skips = [why(spec.message) for run in runs.values() for spec in run.those("skipped")]
    selected = {spec.name for run in runs.values() for spec in run.specs}
    never = {spec.name for run in runs.values() for spec in run.left_out} - selected
    known = [*((pattern, NOT_HERE, reason) for pattern, reason in left_out), *LEFT_OUT]
    reasons = [found for name in never for found in _why_left_out(name, known)]
    return "\n".join([*lines, "", *_grouped("skipped", skips), *_grouped("not selected", reasons)])


def _row(name: str, runs: Sequence[Run]) -> str:
    counts = [sum(len(found) for found in each) for each in (
        (run.specs for run in runs),
        (run.those("passed") + run.failed for run in runs),
        (run.those("passed") for run in runs),
        (run.failed for run in runs),
        (run.those("skipped") for run in runs),
    )]  # fmt: skip
    selected, ran, passed, failed, skipped = counts
    return f"{name:28} {selected:8} {ran:6} {passed:6} {failed:6} {skipped:7} {sum(run.seconds for run in runs) / 60:7.1f}"


def _why_left_out(name: str, known: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    return [(kind, reason) for pattern, kind, reason in known if re.search(pattern, name)][:1]


def _grouped(title: str, reasons: Iterable[tuple[str, str]]) -> list[str]:
    counted = Counter(reasons)
    lines = []
    for kind in sorted({kind for kind, _ in counted}, key=lambda kind: (kind != UNKNOWN, kind)):
        counts = {reason: count for (found, reason), count in counted.items() if found == kind}
        lines.append(f"{title}, {kind}: {sum(counts.values())}")
        lines += [f"  {count:4}  {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])]
    return lines


def _is_storage(spec: dict[str, Any]) -> bool:
    return spec["LeafNodeType"] == "It" and "External Storage" in (spec["ContainerHierarchyTexts"] or [""])[0]


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
