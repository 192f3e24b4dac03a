"""How each system of a spec is started, and why one is absent."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from peers import preloaded
from spec import ModelSpec, SystemSpec
from systems import Process, Row

from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.fingerprint import model_digest
from octavo.weights.model_files import read_model


class Absent(Exception):
    """A system that is not on this machine; its text says what is missing."""


class Catalog:
    """Starts the systems of one model. folder: where files in peers' formats are kept."""

    def __init__(
        self, arguments: argparse.Namespace, model: ModelSpec, path: Path, folder: Path
    ) -> None:
        self._arguments, self.path, self.load_format = arguments, path, model.load_format
        self._seconds = max(60.0, model.seconds / 3)  # that one answer of a system may take
        # One for each model: another one, or another version, may have the same name.
        self._folder = folder / model_digest(path, model.load_format)
        self._folder.mkdir(parents=True, exist_ok=True)

    def start(self, system: SystemSpec, rows: Sequence[Row]) -> Process:
        """A process with the system loaded. rows: all that it will be asked for.

        Raises Absent, or RuntimeError with what it printed.
        """
        starts = {
            "octavo": self._octavo,
            "reference": self._reference,
            "transformers": self._transformers,
            "llama.cpp": self._llama_cpp,
            "vllm": self._vllm,
            "openvino": self._openvino,
        }
        return starts[system.engine](system, list(rows))

    def _octavo(self, system: SystemSpec, rows: list[Row]) -> Process:
        if system.device == "cuda":
            require_device()
        more = (self._arguments.threads, self.load_format, rows, system.device)
        return self._process("octavo_system.OctavoCore", self.path, system.format, *more)

    def _reference(self, system: SystemSpec, rows: list[Row]) -> Process:
        return self._process("octavo_system.Reference", self.path, self.load_format)

    def _transformers(self, system: SystemSpec, rows: list[Row]) -> Process:
        require_packages("transformers", "torch")
        if system.device == "cuda":
            require_device()
        caches = [variant for variant in system.variants if variant != "cuda"]
        settings = (self.path, system.format, self._arguments.threads, self.load_format)
        more = (caches[0] if caches else "dynamic", system.device)
        return self._process("transformers_system.Transformers", *settings, *more)

    def _llama_cpp(self, system: SystemSpec, rows: list[Row]) -> Process:
        require_packages("gguf")
        bench = self.llama_bench()
        file, threads = self.gguf(system.format), self._arguments.threads
        if bench is not None:
            return self._process("peers.LlamaBinaries", bench, file, threads)
        if importlib.util.find_spec("xllamacpp") is None:
            raise Absent("neither llama-bench nor the package xllamacpp is there")
        longest = max(row.longest for row in rows)
        return self._process("peers.Xllamacpp", file, threads, longest)

    def llama_bench(self) -> Path | None:
        """Given, beside this Python (build_llama.sh), or on the PATH."""
        beside = Path(sys.executable).with_name("llama-bench")
        given = self._arguments.llama_bench or (beside if beside.is_file() else None)
        given = given or shutil.which("llama-bench")
        return Path(given) if given else None

    def gguf(self, form: str, vocabulary: str = "") -> Path:
        """The model as a GGUF file, written once. vocabulary: its own tokens, split so."""
        from write_gguf import write_gguf

        own = f"-{vocabulary}" if vocabulary else ""
        file = self._folder / f"{self.path.name}-{form}{own}.gguf"
        if not file.is_file():
            files = read_model(self.path)
            checkpoint = open_checkpoint(files, self.load_format)
            unfinished = file.with_suffix(".part")
            write_gguf(unfinished, files, checkpoint, form, vocabulary or None)
            unfinished.rename(file)
        return file

    def vllm_python(self) -> Path:
        """The Python that has vLLM."""
        return self._python(self._arguments.vllm_python, "vllm", "--vllm-python")

    def _vllm(self, system: SystemSpec, rows: list[Row]) -> Process:
        python = self.vllm_python()
        more = (self._arguments.threads, self.load_format, rows, self._arguments.vllm_eager)
        settings = {"python": python, "environment": preloaded(python)}
        return self._process("peers.Vllm", self.path, *more, **settings)

    def _openvino(self, system: SystemSpec, rows: list[Row]) -> Process:
        given = self._arguments.openvino_python
        python = self._python(given, "openvino_genai", "--openvino-python")
        settings = (self.path, self._folder / "openvino", system.format, self._arguments.threads)
        return self._process("peers.OpenVino", *settings, self.load_format, rows, python=python)

    def _process(self, kind: str, *settings: object, **more: object) -> Process:
        return Process(kind, *settings, seconds=self._seconds, **more)

    @staticmethod
    def _python(given: Path | None, package: str, option: str) -> Path:
        if given is not None:
            if not given.is_file():
                raise Absent(f"{option} is {given}, and there is no such file")
            return given
        if importlib.util.find_spec(package) is None:
            raise Absent(f"the package {package} is not installed, and no {option} was given")
        return Path(sys.executable)


def require_packages(*packages: str) -> None:
    """Raise Absent for the first that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Absent(f"the package {package} is not installed")


def require_device() -> None:
    """Raise Absent without a GPU that octavo was built for."""
    from octavo import _native

    if not _native.build_info()["num_devices"]:
        raise Absent("there is no NVIDIA GPU here, or octavo was built without CUDA")
