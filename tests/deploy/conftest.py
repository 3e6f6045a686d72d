"""The chart, rendered by the pinned helm."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def _load():
    spec = importlib.util.spec_from_file_location("render", ROOT / "deploy" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pinned():
    version = re.search(r"^HELM_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    return ROOT / ".cache" / "bin" / f"helm-{version}"


@pytest.fixture(scope="session")
def chart():
    """Give deploy/render.py: its `helm`, `template` and `render`."""
    helm = Path(os.environ.get("HELM") or _pinned())
    if not helm.exists():
        pytest.skip(
            f"there is no {helm}: `make {helm.relative_to(ROOT) if helm.is_relative_to(ROOT) else helm}` builds it, with Go"
        )
    os.environ["HELM"] = str(helm)
    return _load()


@pytest.fixture(scope="session")
def objects(chart):
    """Return a function that renders the chart and returns its objects, parsed."""

    def objects(*options, **how):
        return [found for found in yaml.safe_load_all(chart.template(*options, **how)) if found]

    return objects


NFS = (
    "--set=nfs.pools.fast.server=nfs.example.com",
    "--set=nfs.pools.fast.path=/srv",
    "--set=nfs.pools.fast.options={vers=4.2,hard}",
)


@pytest.fixture(scope="session")
def everything(objects):
    """All objects of both kinds, with everything on that can be."""
    return objects(
        *NFS, "--set=serviceMonitor.enabled=true", "--set=nfs.node.metricsPort=9809", "--set=nfs.controller.metricsPort=9810"
    )
