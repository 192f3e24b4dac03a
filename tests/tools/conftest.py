"""What the tests of every command share: a folder with a model and files, taken as the home."""

from __future__ import annotations

import pytest
from command_helpers import Place, make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def home(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.enter(monkeypatch)
