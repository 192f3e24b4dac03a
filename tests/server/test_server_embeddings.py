"""POST /v1/embeddings: answers, errors, limits, clients that go; and OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from embedding_helpers import LIMITS, write_embedding_model
from server_helpers import RawClient, error_of, fake_llm, listening, run, server_process, serving

from octavo import LLM
from octavo.engine.pooling import normalized
from octavo.server import formats

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["The capital of France is Paris.", "a ship", "naïve café " * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedding_model(tmp_path_factory.mktemp("served") / "tiny", tokenizer=True)


@pytest.fixture
def llm(folder: Path) -> LLM:
    return LLM(folder, **LIMITS)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[np.ndarray]:
    return [each.embedding for each in LLM(folder, **LIMITS).embed(TEXTS, progress=False)]


def vectors_of(answer: dict[str, Any]) -> list[np.ndarray]:
    """Those of the answer, in either encoding."""
    found = []
    for index, entry in enumerate(answer["data"]):
        assert set(entry) == {"object", "index", "embedding"}
        assert (entry["object"], entry["index"]) == ("embedding", index)
        given = entry["embedding"]
        numbers = np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else given
        found.append(np.array(numbers, np.float32))
    return found


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_texts_and_token_ids(llm: LLM, expected: list[np.ndarray], encoding: str | None) -> None:
    ids = [llm.get_tokenizer().encode(text) for text in TEXTS]
    count = sum(map(len, ids))

    async def test() -> None:
        async with serving(llm, served_names=("tiny", "alias")) as (client, _):
            for given, wanted, num_tokens in (
                (TEXTS, expected, count),
                (ids, expected, count),
                (TEXTS[0], expected[:1], len(ids[0])),
                (ids[0], expected[:1], len(ids[0])),
            ):
                body = {"model": "alias", "input": given, "user": "somebody"}
                if encoding is not None:
                    body["encoding_format"] = encoding
                response = await client.post(EMBEDDINGS, json=body)
                assert response.status_code == 200, response.text
                answer = response.json()
                assert set(answer) == {"object", "data", "model", "usage"}
                assert (answer["object"], answer["model"]) == ("list", "tiny")
                usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
                assert answer["usage"] == usage
                kind = str if encoding == "base64" else list
                assert all(isinstance(entry["embedding"], kind) for entry in answer["data"])
                found = vectors_of(answer)
                assert [x.tobytes() for x in found] == [x.tobytes() for x in wanted]

    run(test)


def test_vectors_are_written_beside_the_event_loop(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, so that others get their turns: a million numbers take a second."""
    written: list[tuple[int, str]] = []

    def to_json(value: Any) -> str:
        text = formats.to_json(value)
        written.append((threading.get_ident(), text))
        return text

    monkeypatch.setattr("octavo.server.embeddings.to_json", to_json)

    async def test() -> None:
        async with serving(llm) as (client, _):
            response = await client.post(EMBEDDINGS, json={"input": TEXTS})
            assert len(response.json()["data"]) == len(TEXTS)
        assert sum("index" in text for _, text in written) == len(TEXTS)
        assert max(text.count('"index"') for _, text in written) == 1
        assert threading.get_ident() not in {thread for thread, _ in written}

    run(test)


def test_dimensions(llm: LLM, expected: list[np.ndarray]) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            body = {"input": TEXTS, "dimensions": 17}
            answer = (await client.post(EMBEDDINGS, json=body)).json()
            for found, vector in zip(vectors_of(answer), expected, strict=True):
                np.testing.assert_allclose(found, normalized(vector[:17]), rtol=1e-6)
            raw = (await client.post(EMBEDDINGS, json={**body, "normalize": False})).json()
            given = zip(vectors_of(raw), vectors_of(answer), strict=True)
            for found, vector in given:
                assert not 0.99 < np.linalg.norm(found) < 1.01
                np.testing.assert_allclose(normalized(found), vector, rtol=1e-6)
            for wrong in (0, 97, -3, "x"):
                error = error_of(
                    await client.post(EMBEDDINGS, json={**body, "dimensions": wrong}), 400
                )
                assert error["param"] == "dimensions", error
            assert (
                "expected 1 to 96"
                in (error_of(await client.post(EMBEDDINGS, json={**body, "dimensions": 97}), 400))[
                    "message"
                ]
            )

    run(test)


WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({}, 400, "input", "required"),
    ({"input": []}, 400, "input", ""),
    ({"input": ""}, 400, "input", "empty"),
    ({"input": ["a", ""]}, 400, "input[1]", "empty"),
    ({"input": [[3], []]}, 400, "input[1]", "empty"),
    ({"input": [[3], [512]]}, 400, "input[1]", "token 0 of the prompt is 512; expected 0 to 511"),
    ({"input": [3, -1]}, 400, "input", "greater than or equal to 0"),
    ({"input": ["a", 3]}, 400, "input", ""),
    ({"input": {"text": "a"}}, 400, "input", ""),
    ({"input": [[3] * 129]}, 400, "input[0]", "expected at most 128"),
    ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "'float' or 'base64'"),
    ({"input": "a", "stream": True}, 400, "stream", ""),
    ({"input": "a", "model": "other"}, 404, "model", "not served here"),
    ({"input": "a", "input_type": "query"}, 400, "input_type", "before each text"),
    ({"input": "a", "truncate_prompt_tokens": 5}, 400, "truncate_prompt_tokens", ""),
    ({"input": "a", "messages": [{"role": "user", "content": "x"}]}, 400, "messages", "use input"),
    ({"input": "a", "timeout": -1}, 400, "timeout", ""),
]


@pytest.mark.parametrize(("body", "status", "param", "message"), WRONG, ids=str)
def test_wrong_bodies(
    llm: LLM, body: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            error = error_of(await client.post(EMBEDDINGS, json=body), status)
            assert error["param"] == param, error
            assert message in error["message"]
            if "at most 128" in message:
                assert error["code"] == "context_length_exceeded"

    run(test)


def test_each_kind_of_model_has_routes_of_its_own(llm: LLM, tmp_path: Path) -> None:
    async def test() -> None:
        messages = [{"role": "user", "content": "Hi"}]
        async with serving(llm) as (client, _):
            for path, body in (
                ("/v1/chat/completions", {"messages": messages}),
                ("/v1/completions", {"prompt": "a"}),
                ("/v1/responses", {"input": "a"}),
            ):
                error = error_of(await client.post(path, json=body), 400)
                assert error["param"] == "model" and EMBEDDINGS in error["message"]
                assert "--runner generate" in error["message"]
            body = {"messages": messages, "max_tokens": 3}
            response = await client.post("/v1/messages", json=body)
            assert response.status_code == 400 and "gives embeddings" in response.text
            answer = (await client.post("/tokenize", json={"prompt": "a"})).json()
            assert answer["count"] == 1
        async with serving(fake_llm(tmp_path)) as (client, _):
            error = error_of(await client.post(EMBEDDINGS, json={"input": "a"}), 400)
            assert error["param"] == "model" and "--runner pooling" in error["message"]

    run(test)


def test_metrics_and_the_log_count_them(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    num_tokens = len(llm.get_tokenizer().encode(TEXTS[0]))

    async def test() -> None:
        async with serving(llm) as (client, _):
            caplog.set_level("INFO")
            assert (await client.post(EMBEDDINGS, json={"input": TEXTS[0]})).status_code == 200
            text = (await client.get("/metrics")).text
            line = 'vllm:{}_total{{engine="0",model_name="model"}} {}'
            assert line.format("prompt_tokens", float(num_tokens)) in text
            assert line.format("generation_tokens", 0.0) in text
            ended = 'vllm:request_success_total{engine="0",finished_reason="length"'
            assert f'{ended},model_name="model"}} 1.0' in text
        (record,) = [each for each in caplog.records if each.name == "octavo.access"][:1]
        assert f"'prompt_tokens': {num_tokens}" in str(vars(record))
        assert "'completion_tokens': 0" in str(vars(record))

    run(test)


class Held:
    """Holds every step of a runtime until it is told to go on."""

    def __init__(self, llm: LLM) -> None:
        self.go = threading.Event()
        self._runtime = llm.engine.runtime
        llm.engine._pipeline._runtime = self  # type: ignore[assignment]

    def wait(self, ticket: int) -> Any:
        assert self.go.wait(30)
        return self._runtime.wait(ticket)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


def test_a_deadline_that_passes(llm: LLM) -> None:
    held = Held(llm)

    async def test() -> None:
        async with serving(llm) as (client, _):
            asked = asyncio.ensure_future(
                client.post(EMBEDDINGS, json={"input": ["a", "b " * 40] * 3, "timeout": 0.05})
            )
            await asyncio.sleep(0.2)
            held.go.set()
            error = error_of(await asked, 504)
            assert error["code"] == "deadline_exceeded"
            assert (await client.post(EMBEDDINGS, json={"input": "a"})).status_code == 200

    run(test)


def test_a_client_that_goes_ends_its_requests(llm: LLM) -> None:
    held = Held(llm)

    async def test() -> None:
        async with serving(llm) as (client, service):
            raw = RawClient(service, EMBEDDINGS, {"input": TEXTS})
            task = asyncio.ensure_future(raw.run())
            while service.engine.num_open < len(TEXTS):
                await asyncio.sleep(0.01)
            raw.gone.set()
            await task
            assert service.engine.num_open == 0
            held.go.set()
            assert (await client.post(EMBEDDINGS, json={"input": "a"})).status_code == 200

    run(test)


def test_a_full_queue(folder: Path) -> None:
    limited = {**LIMITS, "max_num_seqs": 1, "max_waiting_requests": 1}
    llm = LLM(folder, **limited)
    held = Held(llm)

    async def test() -> None:
        async with serving(llm) as (client, _):
            asked = []
            for _ in range(2):
                asked.append(asyncio.ensure_future(client.post(EMBEDDINGS, json={"input": TEXTS})))
                await asyncio.sleep(0.1)
            held.go.set()
            statuses = [(await each).status_code for each in asked]
            assert statuses[0] == 200  # the texts of one request wait as one
            text = (await client.get("/metrics")).text
            refused = 'vllm:admission_rejections_total{engine="0",model_name="model",reason='
            assert f'{refused}"queue_full"}} {float(statuses.count(429))}' in text
            assert statuses[1] == 429

    run(test)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with listening(LLM(folder, **LIMITS), served_names=("tiny",)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_the_client_of_openai(client: openai.OpenAI, expected: list[np.ndarray]) -> None:
    """Which asks for base64 unless told otherwise, and decodes it."""
    for options in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model="tiny", input=TEXTS, **options)  # type: ignore[call-overload]
        assert answer.model == "tiny" and answer.object == "list"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10
        for index, (entry, vector) in enumerate(zip(answer.data, expected, strict=True)):
            assert (entry.index, entry.object) == (index, "embedding")
            np.testing.assert_array_equal(np.array(entry.embedding, np.float32), vector)
    short = client.embeddings.create(model="tiny", input=[3, 4, 5], dimensions=8)
    assert len(short.data) == 1 and len(short.data[0].embedding) == 8
    raw = client.embeddings.create(model="tiny", input="x", encoding_format="base64")
    assert isinstance(raw.data[0].embedding, str)
    with pytest.raises(openai.BadRequestError, match="dimensions is 97"):
        client.embeddings.create(model="tiny", input="x", dimensions=97)
    with pytest.raises(openai.BadRequestError, match="gives embeddings"):
        client.completions.create(model="tiny", prompt="x")


def test_octavo_serve_sees_what_a_model_is_for(folder: Path, tmp_path: Path) -> None:
    """And is told so by --runner."""
    options = ("--device", "cpu", "--num-threads", "1", "--num-kv-blocks", "40")
    with server_process(tmp_path, str(folder), *options) as server:
        server.wait_for("gives embeddings: the state of the last token, 96 numbers")
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert len(api.embeddings.create(model="", input=TEXTS).data) == 3
        entry = server.wait_for("request", path=EMBEDDINGS)
        assert entry["status"] == 200 and entry["completion_tokens"] == 0
    plain = write_embedding_model(tmp_path / "plain", modules=False, tokenizer=True)
    (tmp_path / "second").mkdir()
    with server_process(tmp_path / "second", str(plain), *options, "--runner", "pooling") as server:
        api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert len(api.embeddings.create(model="", input="a").data[0].embedding) == 96


def test_token_ids_alone_without_a_tokenizer(tmp_path: Path) -> None:
    llm = LLM(write_embedding_model(tmp_path / "bare"), **LIMITS)

    async def test() -> None:
        async with serving(llm) as (client, _):
            assert (await client.post(EMBEDDINGS, json={"input": [3, 4]})).status_code == 200
            error = error_of(await client.post(EMBEDDINGS, json={"input": "a"}), 400)
            assert "no tokenizer" in error["message"]

    run(test)
