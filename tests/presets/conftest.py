"""Stand-ins for the bases, made once."""

import pytest

from tests.presets.stand_ins import make_stand_ins


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Key of a base -> a directory with a small model in its place."""
    return make_stand_ins(tmp_path_factory.mktemp("bases"))
