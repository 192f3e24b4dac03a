"""octavo pull: a model that lies under a name already is not taken for another source's."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.config import read_environment
from octavo.errors import InvalidArgumentError
from octavo.weights.hub import DEFAULT_MODEL, pull
from weights_helpers import write_gguf


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "someone/model"])
def test_another_source_is_refused(tmp_path: Path, name: str) -> None:
    environment = read_environment({"OCTAVO_HOME": str(tmp_path / "home")})
    write_gguf(tmp_path / "x.gguf")
    path = pull(str(tmp_path / "x.gguf"), environment, name=name)
    with pytest.raises(InvalidArgumentError, match=rf"made from x.gguf, not {name}.*--force"):
        pull(name, environment)
    (path / "octavo.json").unlink()  # put there by hand: nothing is known of it
    assert pull(name, environment) == path
