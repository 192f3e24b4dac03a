"""octavo pull: whose name a model has, and how its progress is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from weights_helpers import write_gguf

from octavo.config import read_environment
from octavo.errors import InvalidArgumentError
from octavo.progress import Bar
from octavo.weights import hub, wheel
from octavo.weights.hub import DEFAULT_MODEL, pull


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "someone/model"])
def test_another_source_is_refused(tmp_path: Path, name: str) -> None:
    environment = read_environment({"OCTAVO_HOME": str(tmp_path / "home")})
    write_gguf(tmp_path / "x.gguf")
    path = pull(str(tmp_path / "x.gguf"), environment, name=name)
    with pytest.raises(InvalidArgumentError, match=rf"made from x.gguf, not {name}.*--force"):
        pull(name, environment)
    (path / "octavo.json").unlink()  # put there by hand: nothing is known of it
    assert pull(name, environment) == path


def test_known_names_are_wheel_models() -> None:
    assert set(hub.KNOWN_MODELS) == set(wheel.WHEEL_MODELS)
    assert hub.DEFAULT_MODEL in hub.KNOWN_MODELS


def test_the_bar_takes_any_sequence_of_calls() -> None:
    with Bar("bytes", keep=True) as bar:
        bar.message("[not] markup")
        bar.start("Unknown", 0)
        bar.advance(10)
        bar.finish()
        bar.start("Known", 100)
        bar.advance(250)
        bar.finish()
    with Bar("bytes", keep=True) as bar:
        bar.start("Nothing", 0)
        bar.finish()
