"""For all tests: a slow machine is no failing property, and which tests share a process under pytest-xdist."""

import pytest
from hypothesis import settings

settings.register_profile("planaria", deadline=None)
settings.load_profile("planaria")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A file's tests share its fixtures, and those that need ``tests.forked`` its server."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            group = "forked" if "server" in item.fixturenames else str(item.path)
            item.add_marker(pytest.mark.xdist_group(group))
