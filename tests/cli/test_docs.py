"""The documents say what the code does: links lead somewhere, tables are the code's own."""

import errno
import re

import pytest

from csi_driver.rpc.lanes import LANES
from csi_driver.rpc.status import CODES, ERRNO_CODES
from csi_driver.volumes.pool_layout import FOLDERS
from tests.cli.trials import REPOSITORY

DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
DESIGN = (REPOSITORY / "docs" / "design.md").read_text()


def rows(head):
    """Return the cells of the table in design.md that begins with this head."""
    _, _, rest = DESIGN.partition(f"\n{head}\n")
    assert rest, f"design.md has no table {head}"
    lines = rest.splitlines()[1:]
    end = next(index for index, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines[:end]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    assert [link for link in links if not link.startswith("https://") and not (document.parent / link).exists()] == []


def test_each_decision_is_in_their_list():
    folder = REPOSITORY / "docs" / "decisions"
    listed = re.findall(r"\((\d{4}-.*?\.md)\)", (folder / "README.md").read_text())
    assert listed == sorted(page.name for page in folder.glob("0*.md"))


def test_the_table_of_errors_is_that_of_the_code():
    documented = {error: code for error, code, _ in rows("| error | code | raised when |")}
    assert documented == {kind.__name__: code.name for kind, code in CODES.items()}


def test_the_table_of_errnos_is_that_of_the_code():
    documented = {name: code for names, code in rows("| errno | code |") for name in names.split(", ")}
    assert documented == {errno.errorcode[number]: code.name for number, code in ERRNO_CODES.items()}


def test_the_table_of_lanes_is_that_of_the_code():
    documented = rows("| lane | calls at once | seconds without a deadline | seconds at most |")
    assert documented == [[lane.name, str(lane.capacity), str(lane.seconds), str(lane.most_seconds)] for lane in LANES]


def test_each_room_and_each_folder_of_a_pool_is_described():
    package = REPOSITORY / "csi_driver"
    rooms = {f"csi_driver/{place.name}" for place in package.iterdir() if (place / "__init__.py").exists()}
    described = {row[0] for row in rows("| room | what it does | knows |")}
    modules = {f"csi_driver/{file.name}" for file in package.glob("[!_]*.py")}
    assert described == rooms | modules
    assert [folder for folder in FOLDERS if not re.search(rf"^    .*\b{folder}/", DESIGN, re.MULTILINE)] == []


def test_each_module_that_is_named_exists():
    package = REPOSITORY / "csi_driver"
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    named = set(re.findall(r"`((?:rpc|volumes|linux|cli|config|telemetry|backends)/[a-z_]+\.py)`", text))
    assert len(named) > 8
    history = {"volumes/errors.py"}  # decision 1 tells why it is not there
    assert {name for name in named - history if not (package / name).exists()} == set()
    assert {name for name in re.findall(r"`([a-z_]+\.py)`", DESIGN) if not list(package.rglob(name))} == set()
