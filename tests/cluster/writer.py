"""A pod that writes and checks itself: whether anything stopped, or went missing, while something of the driver was away.

It numbers its lines, reads back each one, and ends with an error when one is not what it wrote.
"""

import itertools
from dataclasses import dataclass

from cluster.progress import wait_until
from cluster.story import Story

SCRIPT = """
n=0
while :; do
  n=$((n + 1))
  echo "$n $(cut -d' ' -f1 /proc/uptime)" >> /data/log || exit 1
  echo "$n" > /data/new && mv /data/new /data/last || exit 1
  [ "$(tail -n 1 /data/log | cut -d' ' -f1)" = "$n" ] && [ "$(cat /data/last)" = "$n" ] || exit 2
  sleep 0.1
done
"""
COMMAND = ("sh", "-c", SCRIPT)


@dataclass(frozen=True)
class Writer:
    """A running writer, with its volume at /data."""

    story: Story
    pod: str

    def written(self) -> int:
        """Return the number of its last line; 0 where there is none yet."""
        return int(self.story.k.sh(self.pod, "cat /data/last 2>/dev/null || echo 0"))

    def check(self, before: int, longest_gap: float = 5) -> None:
        """Assert that it wrote on after line `before`, missed no number and never waited longer than `longest_gap` seconds."""
        wait_until("more lines", lambda: self.written() > before + 20, 60)
        found = self.story.k.get("pod", self.pod)
        assert found["status"]["phase"] == "Running"
        assert found["status"]["containerStatuses"][0]["restartCount"] == 0
        rows = [line.split() for line in self.story.k.sh(self.pod, "cat /data/log").splitlines()]
        assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
        times = [float(at) for _, at in rows]
        gap = max(later - earlier for earlier, later in itertools.pairwise(times))
        assert gap < longest_gap, f"{self.pod} wrote nothing for {gap:.1f} s"
