"""OpenVINO GenAI's side of compare_cpu.py, from here: a process of the Python that has it."""

from __future__ import annotations

from pathlib import Path

from other_python import OtherPythonSide
from rows import Row, longest_of, most_requests_of, most_tokens_of

# octavo's format -> OpenVINO's beside it.
OPENVINO_FORMATS = {"bf16": "bf16", "int8": "int8", "w8a8": "int8", "int4-g128": "int4-g128"}


class OpenvinoSide(OtherPythonSide):
    """OpenVINO GenAI in one format.

    python: the interpreter of an environment that has it. folder: where converted models are kept,
    each in a folder of its own; what is not there is made (minutes).
    """

    def __init__(
        self,
        python: Path,
        path: Path,
        folder: Path,
        form: str,
        threads: int,
        load_format: str,
        rows: list[Row],
    ) -> None:
        converted = (folder / f"{path.name}-{form}").absolute()
        limits = [longest_of(rows), most_requests_of(rows), most_tokens_of(rows)]
        settings = [str(path), str(converted), form, threads, load_format, *limits]
        super().__init__("OpenVINO", python, "openvino_worker.py", settings, {})
