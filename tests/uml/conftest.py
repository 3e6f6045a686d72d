"""What is below guest_tests/ runs in a guest only: it makes network namespaces and NFS servers that the machine cannot have."""

import os

import guest
import pytest
from groups import Guests

collect_ignore = [] if os.environ.get("TATAMI_GUEST") else ["guest_tests"]
_guests_key = pytest.StashKey[Guests]()


def pytest_collection_modifyitems(items) -> None:
    # Last, in the order of the groups: their guests are at work meanwhile.
    items.sort(key=lambda item: "guests" in getattr(item, "fixturenames", ()))


def pytest_collection_finish(session) -> None:
    groups = [item.callspec.params["group"] for item in session.items if "guests" in getattr(item, "fixturenames", ())]
    if groups and os.geteuid() == 0 and not session.config.option.collectonly:
        guest.install()
        guest.remove_leftovers()
        session.stash[_guests_key] = Guests(groups)


def pytest_sessionfinish(session) -> None:
    guests = session.stash.get(_guests_key, None)
    if guests is not None:
        guests.close()


@pytest.fixture(scope="session")
def guests(request) -> Guests:
    if os.geteuid() != 0:
        pytest.skip("booting a guest that binds this machine's root directory needs root")
    return request.session.stash[_guests_key]
