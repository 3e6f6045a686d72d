"""Run the suite in the cluster that is up: its images onto the nodes, its specs in parallel processes, its report read.

All that it says goes to files below .cache/cluster/external: a skipped spec alone prints thousands of characters.
"""

import json
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster import binaries, images
from cluster.external import report
from cluster.external.parts import HERE, Part, left_out
from cluster.kubectl import Kubectl
from cluster.layout import BINARIES, CACHE, KUBECONFIG
from cluster.nodes import Node
from cluster.progress import say, step

OUTPUT = CACHE / "external"
IMAGES = ("agnhost", "busybox", "glibc-dns-testing", "nginx", "pause")
"""What the storage specs' pods are made of, by the last part of the images' names. Only agnhost has to be what it is called: of busybox,
nginx and the one with glibc they want a shell, the usual small programs, and a dd that knows `oflag=nocache`."""
QUICK = "!Slow && !Disruptive"


def prepare(nodes: Sequence[Node]) -> None:
    """Build the suite, give the nodes its images under the names it asks for, and the API server what sets its objects right."""
    binaries.build_suite()
    Kubectl().run("apply", "-f", str(HERE / "classes" / "group-classes.yaml"))
    with step("the suite's images onto the nodes"):
        for kind, names in _wanted_images().items():
            archive = _image(kind, names[0])
            for node in nodes:
                node.import_image(archive)
                for name in names[1:]:
                    node.tag_image(names[0], name)


def run(part: Part, labels: str, focus: str, processes: int) -> report.Run:
    """Run a part's specs that have these labels and names, and return what they came to. Raises RuntimeError where it made no report."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    name = part.title.replace(" ", "-")
    testdriver, result, log = (OUTPUT / f"{name}{suffix}" for suffix in (".testdriver.json", ".json", ".log"))
    testdriver.write_text(json.dumps(part.testdriver))
    result.unlink(missing_ok=True)
    skipped = [report.NEEDS_IMAGES, *(left.specs for left in left_out(part.backend)), *([part.skip] if part.skip else [])]
    command = [
        str(BINARIES / "ginkgo"), f"--procs={processes}", "--timeout=3h", "--poll-progress-after=0", "--no-color", "--silence-skips",
        # Several expressions are alternatives to ginkgo, so what has to be true at once is one of them.
        f"--label-filter={labels}", f"--focus=External.Storage.*({part.focus}).*({focus})", *(f"--skip={one}" for one in skipped),
        f"--json-report={result.name}", f"--output-dir={OUTPUT}",
        str(BINARIES / "e2e.test"), "--",
        f"--kubeconfig={KUBECONFIG}", "--provider=local", "--allowed-not-ready-nodes=-1", f"--repo-root={HERE}", f"-storage.testdriver={testdriver}",
    ]  # fmt: skip
    with step(f"the suite for {part.title}, said at length in {log}"), log.open("w") as stream, _watched(log):
        _follow(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=OUTPUT))
    if not result.exists():
        raise RuntimeError("the suite did not get far:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]))
    return report.read(result)


def _follow(suite: subprocess.Popen[bytes]) -> None:
    """Wait until the suite has ended. At Ctrl-C, which it hears too, it removes what its specs have made; at the second it is killed."""
    try:
        suite.wait()
    except KeyboardInterrupt:
        say("interrupted: the suite removes what its specs have made (once more: at once, and the next run removes it)")
        suite.wait()
        raise
    finally:
        suite.kill()


def _wanted_images() -> dict[str, list[str]]:
    """Return the names that the suite has for each kind of image: several, for it also has specs about older ones."""
    listed = subprocess.run(
        [str(BINARIES / "e2e.test"), "--list-images"], capture_output=True, text=True, check=True
    ).stdout.split()
    kinds = {kind: [name for name in listed if name.rpartition("/")[2].partition(":")[0] == kind] for kind in IMAGES}
    if missing := [kind for kind, names in kinds.items() if not names]:
        raise RuntimeError(f"the suite of this version asks for no image called {' or '.join(missing)}")
    return kinds


def _image(kind: str, name: str) -> Path:
    match kind:
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
            say(f"  {ended} specs ended of {total[1] if total else '?'}, less those that skip; {failed} failed")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
