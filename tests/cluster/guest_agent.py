"""Run commands in a guest for the machine that it runs on: user-mode Linux has no namespaces that could be entered from outside.

A connection is one command: a line of JSON in, a line of JSON out. Whoever does not know the token gets no answer; it lies in a
directory that only root can read, and the guest's pods are on the same network.
"""

import hmac
import json
import socketserver
import subprocess
import sys
from pathlib import Path


class Command(socketserver.StreamRequestHandler):
    """Run the command of one connection."""

    def handle(self) -> None:
        asked = json.loads(self.rfile.readline(1 << 20))
        if not hmac.compare_digest(asked["token"], self.server.token):
            return
        try:
            done = subprocess.run(
                asked["command"],
                input=asked["stdin"],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=asked["timeout"],
                check=False,
                cwd="/",
            )
            answer = {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        except (OSError, subprocess.TimeoutExpired) as error:
            answer = {"code": 255, "stdout": "", "stderr": str(error)}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


class Agent(socketserver.ThreadingTCPServer):
    """Many commands at a time; it ends with the guest."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64
    token = ""


if __name__ == "__main__":
    Agent.token = Path(sys.argv[3]).read_text().strip()
    with Agent((sys.argv[1], int(sys.argv[2])), Command) as agent:
        agent.serve_forever()
