"""nfs-ganesha on the machine itself, without any help of its kernel, met by a client in user space (libnfs, NFSv4.0)."""

import os
import pathlib
import shutil
import tempfile

import guest
import pytest
from ganesha import Ganesha, Host, free_port
from nodes import CommandFailed, run

pytestmark = pytest.mark.root


@pytest.fixture
def ganesha():
    if os.geteuid() != 0:
        pytest.skip("ganesha opens file handles, which needs root")
    guest.install()
    server = Ganesha(Host(), port=free_port(), graceless=True)
    yield server
    server.close()


@pytest.fixture
def exported():
    # Not tmp_path: a client that is not root has to be able to walk there.
    directory = pathlib.Path(tempfile.mkdtemp(prefix="exported-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def url(server, path):
    return f"nfs://{server.address}{path}?version=4&nfsport={server.port}"


def test_what_a_client_copies_in_is_in_the_exported_directory(ganesha, exported, tmp_path):
    ganesha.export(exported)
    (tmp_path / "source").write_text("over the wire")
    run(["nfs-cp", tmp_path / "source", url(ganesha, exported / "file")])
    assert (exported / "file").read_text() == "over the wire"
    assert "file" in run(["nfs-ls", url(ganesha, exported)]).stdout


def test_a_removed_export_is_refused(ganesha, exported):
    number = ganesha.export(exported)
    run(["nfs-ls", url(ganesha, exported)])
    ganesha.unexport(number)
    with pytest.raises(CommandFailed):
        run(["nfs-ls", url(ganesha, exported)])


def test_a_client_that_is_not_on_the_list_is_refused(ganesha, exported):
    ganesha.export(exported, clients="192.0.2.1")
    with pytest.raises(CommandFailed):
        run(["nfs-ls", url(ganesha, exported)])


def test_exports_survive_a_crash(ganesha, exported):
    (exported / "file").write_text("")
    ganesha.export(exported)
    ganesha.kill()
    ganesha.start()
    assert "file" in run(["nfs-ls", url(ganesha, exported)]).stdout
