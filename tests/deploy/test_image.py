"""What the image is built of; that it builds and runs is seen in the cluster, which has no other."""

import re
import subprocess

from tests.deploy.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def copied():
    lines = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_what_is_copied_is_there_and_reaches_the_build():
    let_through = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(source.rstrip("*") for source in copied()) == sorted(let_through)
    optional = [source for source in copied() if source.endswith("*")]
    assert optional == ["wheels*"]
    assert all((ROOT / source).exists() for source in copied() if source not in optional)


def test_python_packages_are_installed_by_hash_or_from_the_checkout():
    installs = re.findall(r"pip (?:install|wheel) (.*?)(?: \\|$)", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 4
    assert all("--require-hashes" in given or "--no-index" in given for given in installs)


def test_the_image_runs_as_nobody_unless_it_is_told_otherwise():
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["65532:65532"]


def test_without_an_engine_the_build_says_what_to_install(tmp_path):
    for tool in ("sh", "sed", "git", "dirname"):
        (tmp_path / tool).symlink_to(subprocess.check_output(["/bin/sh", "-c", f"command -v {tool}"], text=True).strip())
    done = subprocess.run(
        [ROOT / "deploy" / "build-image"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "docker, podman or buildah" in done.stderr
