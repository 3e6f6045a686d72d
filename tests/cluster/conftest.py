"""The cluster for the stories: the one that is up, or one that is brought up for them and taken away after them.

Each story has a namespace of its own. When one fails, its report has what an admin would ask for: the objects, their events, and
what driver and sidecars said.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import assembly, driver, teardown
from cluster.nodes import Node, all_nodes
from cluster.progress import PATIENCE
from cluster.share import Share
from cluster.share import share as cluster_share
from cluster.story import Story

HERE = Path(__file__).resolve().parent
_story_key = pytest.StashKey[Story]()


def pytest_ignore_collect(collection_path, config):
    """Bring up a cluster only for those who ask for one: by the marker or by this directory."""
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    asked = "cluster" in config.getoption("markexpr") or any(path.is_relative_to(HERE) for path in named)
    return None if asked else True


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.timeout(600 * PATIENCE))
    # The guests cost a busy machine much, also while they do nothing: they come last.
    items.sort(key=lambda item: item.path.is_relative_to(HERE) and "share" in item.fixturenames)


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, Node]]:
    if os.geteuid() != 0:
        pytest.skip("a cluster needs root: namespaces, mounts, a bridge")
    mine = not assembly.is_up()
    if mine:
        teardown.destroy()
        assembly.up()
    yield {node.name: node for node in all_nodes()}
    if mine:
        teardown.destroy()


@pytest.fixture(scope="session")
def share(cluster) -> Iterator[Share]:
    """The nodes with NFS, the driver for it, and the server's share: for stories that ask."""
    mine = not assembly.nfs_is_up()
    yield assembly.up_nfs() if mine else cluster_share()
    if mine:
        assembly.down_nfs()


@pytest.fixture
def story(cluster, request) -> Iterator[Story]:
    story = Story(cluster, request.node.name)
    request.node.stash[_story_key] = story
    story.begin()
    yield story
    story.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    story = item.stash.get(_story_key, None)
    if report.failed and story is not None:
        try:
            report.sections.append(("the story's objects", story.explain()))
            on_nfs = "share" in item.fixturenames
            for namespace in (driver.NFS_NAMESPACE if on_nfs else driver.NAMESPACE, *story.releases):
                report.sections.append((f"the driver in {namespace}", driver.explain(namespace)))
        except (RuntimeError, OSError, TimeoutError) as error:
            report.sections.append(("no explanation", str(error)))
    return report
