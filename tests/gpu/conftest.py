"""The files of the toy task, made once a session."""

import pytest
from toy_task import make_files


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("toy-task"))
