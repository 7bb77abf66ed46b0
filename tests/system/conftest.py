"""A service of this test's own, not started yet."""

import pytest

from tests.process import Service


@pytest.fixture
def service(tmp_path, tiny_models):
    """A service that is not started yet."""
    service = Service(tmp_path, tiny_models)
    yield service
    service.close()
