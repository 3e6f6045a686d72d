#!/usr/bin/env python3
"""Generate csi_driver/rpc/*_pb2* from the protocol files beside this one, or say with --check which of them is stale.

The generated files are committed: the image and a plain `pip install` need no compiler, and a review shows what a new protocol
changes. Needs the development requirements (grpcio-tools, mypy-protobuf); their versions are part of the result.
"""

import argparse
import sys
import sysconfig
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("csi_driver", "rpc")
PROTOCOLS = ("csi", "pluginregistration")
NAMES = tuple(f"{protocol}_pb2{ending}" for protocol in PROTOCOLS for ending in (".py", ".pyi", "_grpc.py", "_grpc.pyi"))


def generate(into: Path) -> dict[Path, bytes]:
    """Compile the protocol files below `into`; return the content of each file, by its path from the root of the checkout.

    Raises RuntimeError when protoc fails; what is wrong is then on standard error, written by protoc itself.
    """
    scripts = Path(sysconfig.get_path("scripts"))
    status = protoc.main(
        [
            "protoc",
            # A virtual path: protoc takes a file for csi_driver/rpc/csi.proto, and so the generated files import each other
            # by the package's name. Only the file name in the descriptor differs from upstream's, and nothing reads that.
            f"-I{PACKAGE}={ROOT / 'proto'}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            f"--python_out={into}",
            f"--grpc_python_out={into}",
            f"--mypy_out=quiet:{into}",
            # only_sync: our server has threads, not an event loop, and so a context is a plain grpc.ServicerContext.
            f"--mypy_grpc_out=quiet,only_sync:{into}",
            *(f"{PACKAGE}/{protocol}.proto" for protocol in PROTOCOLS),
        ],
    )
    if status:
        raise RuntimeError(f"protoc ended with {status}")
    return {PACKAGE / name: (into / PACKAGE / name).read_bytes() for name in NAMES}


def main() -> int:
    """Write what is stale, or with --check name it and return 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a committed file is stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as directory:
        wanted = generate(Path(directory))
    stale = [path for path in wanted if not (ROOT / path).is_file() or (ROOT / path).read_bytes() != wanted[path]]
    for path in stale:
        if not check:
            (ROOT / path).write_bytes(wanted[path])
        sys.stderr.write(f"{path}: {'is stale, run proto/generate.py' if check else 'written'}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
