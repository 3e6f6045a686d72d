import pytest

from tests.cli.trials import Trials


@pytest.fixture
def trials():
    """Trials of whoever runs the tests."""
    made = Trials()
    yield made
    made.close()


@pytest.fixture(params=["oneself", pytest.param("an ordinary user", marks=pytest.mark.root)])
def anybodys(request):
    """Trials of whoever runs the tests, and of a user without rights."""
    made = Trials(rootless=request.param != "oneself")
    yield made
    made.close()
