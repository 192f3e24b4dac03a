"""Two servers for all clients: the parrot in a thread, SmolLM2 in a process of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from reference_helpers import need_smollm2
from server_helpers import listening, server_process

from clients.scenes import MODEL, Served, write_model
from octavo.llm import LLM
from octavo.text.chat import ChatTemplate

# Before any client is imported: none of them is to ask the network for anything else.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LANGSMITH_TRACING"] = "false"


def pytest_configure() -> None:
    # Some clients leave their sockets to the end of the process.
    warnings.simplefilter("ignore", ResourceWarning)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "clients" in item.path.parts:  # warnings are the libraries' own, not octavo's
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def _parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    llm = LLM(write_model(tmp_path_factory.mktemp("parrot")), num_threads=1)
    prompts: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        render = ChatTemplate.render

        def recording_render(*args: Any, **variables: Any) -> str:
            prompts.append(render(*args, **variables))
            return prompts[-1]

        patch.setattr(ChatTemplate, "render", recording_render)
        with listening(llm, served_names=(MODEL,)) as url:
            yield Served(url, prompts)


@pytest.fixture
def parrot(_parrot: Served) -> Served:
    """The parrot of scenes.py, and no prompt seen yet."""
    _parrot.prompts.clear()
    return _parrot


@pytest.fixture
def client(parrot: Served) -> Any:
    """OpenAI's own client of the parrot, which tries nothing twice."""
    import openai

    return openai.OpenAI(base_url=parrot.api, api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    need_smollm2()
    options = ("--max-model-len", "1024", "--num-threads", "2")
    with server_process(tmp_path_factory.mktemp("smollm2"), *options) as server:
        yield Served(server.url)
