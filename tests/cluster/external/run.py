"""Run the suite in the cluster that is up: its images onto the nodes, its specs in parallel processes, its report read.

All that it says goes to files below .cache/cluster/external: a skipped spec alone prints thousands of characters.
"""

import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import binaries, images
from cluster.external import report
from cluster.layout import BINARIES, CACHE, KUBECONFIG
from cluster.nodes import Node
from cluster.progress import say, step

HERE = Path(__file__).resolve().parent
OUTPUT = CACHE / "external"
IMAGES = ("agnhost", "busybox", "glibc-dns-testing", "nginx", "pause")
"""What the storage specs' pods are made of, by the last part of the images' names. Only agnhost has to be what it is called: of busybox,
nginx and the one with glibc they want a shell, the usual small programs, and a dd that knows `oflag=nocache`."""
QUICK = "!Slow && !Disruptive"
DISRUPTIVE = "Disruptive"
"""They stop the kubelet over ssh, as a service of systemd: the nodes of this cluster have neither."""


@dataclass(frozen=True)
class Selection:
    """Which specs: a backend's, those with these labels, those whose name has this expression in it."""

    backend: str
    labels: str = QUICK
    focus: str = ""

    @property
    def testdriver(self) -> Path:
        """What the suite is told about the backend."""
        return HERE / f"{self.backend}.yaml"


def backends() -> list[str]:
    """List the backends that the suite can be run for."""
    return sorted(file.stem for file in HERE.glob("*.yaml"))


def prepare(nodes: Sequence[Node]) -> None:
    """Build the suite and give the nodes its images under the names it asks for."""
    binaries.build_suite()
    with step("the suite's images onto the nodes"):
        for name in _wanted_images():
            archive = _image(name)
            for node in nodes:
                node.import_image(archive)


def run(selection: Selection, processes: int) -> report.Run:
    """Run the specs and return what they came to. Raises RuntimeError where the suite made no report."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    result, log = OUTPUT / f"{selection.backend}.json", OUTPUT / f"{selection.backend}.log"
    result.unlink(missing_ok=True)
    command = [
        str(BINARIES / "ginkgo"), f"--procs={processes}", "--timeout=3h", "--poll-progress-after=0", "--no-color", "--silence-skips",
        f"--label-filter={selection.labels}", f"--focus=External.Storage.*{selection.focus}",
        f"--json-report={result.name}", f"--output-dir={OUTPUT}",
        str(BINARIES / "e2e.test"), "--",
        f"--kubeconfig={KUBECONFIG}", "--provider=local", f"--repo-root={HERE}", f"-storage.testdriver={selection.testdriver}",
    ]  # fmt: skip
    with step(f"the suite for {selection.backend}, said at length in {log}"), log.open("w") as stream, _watched(log):
        subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False, cwd=OUTPUT)
    if not result.exists():
        raise RuntimeError("the suite did not get far:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]))
    return report.read(result)


def _wanted_images() -> list[str]:
    listed = subprocess.run(
        [str(BINARIES / "e2e.test"), "--list-images"], capture_output=True, text=True, check=True
    ).stdout.split()
    return [name for name in listed if name.rpartition("/")[2].partition(":")[0] in IMAGES]


def _image(name: str) -> Path:
    match name.rpartition("/")[2].partition(":")[0]:
        case "agnhost":
            return images.toolbox(name, {"agnhost": BINARIES / "agnhost"}, ["/agnhost"])
        case "pause":
            return images.pause(name)
        case "glibc-dns-testing":
            return images.toolbox(name, images.with_libraries("dd"), ["/bin/sh"])
        case _:
            return images.toolbox(name, {}, ["/bin/sh"])


@contextmanager
def _watched(log: Path) -> Iterator[None]:
    """Say every half minute how far it is: ginkgo prints a bullet for each spec that ended."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(30):
            text = log.read_text(errors="replace")
            total = re.search(r"Will run (\d+) of", text)
            ended, failed = text.count("•"), len(re.findall(r"^• \[(?:FAILED|PANICKED|TIMEDOUT)\]", text, re.MULTILINE))
            say(f"  {ended} specs ended of {total[1] if total else '?'} (with those that skip), {failed} failed")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
