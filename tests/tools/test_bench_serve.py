"""`octavo bench serve`: arithmetic, workloads, its client against a real socket, its output."""

from __future__ import annotations

import asyncio
import json
import math
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from server_helpers import fake_llm, listening

from octavo.bench.serve_client import Client, Record
from octavo.bench.serve_plot import draw, plot
from octavo.bench.serve_report import Slo, cached_share, parse_slo, summarize
from octavo.bench.serve_run import Load, Measured, run_load
from octavo.bench.serve_workload import (
    Job,
    jobs_of_file,
    parse_lengths,
    poisson_gaps,
    random_jobs,
)
from octavo.cli import main
from octavo.errors import InvalidArgumentError, OctavoError

SVG = "{http://www.w3.org/2000/svg}"


def test_lengths() -> None:
    rng = random.Random(1)
    assert {parse_lengths("x", "7")(rng) for _ in range(9)} == {7}
    uniform = [parse_lengths("x", "3-5")(rng) for _ in range(200)]
    assert set(uniform) == {3, 4, 5}
    drawn = [parse_lengths("x", "200~100")(rng) for _ in range(20_000)]
    assert abs(np.mean(drawn) - 200) < 4 and abs(np.std(drawn) - 100) < 6 and min(drawn) >= 1
    for wrong in ("", "0", "5-3", "a", "-4", "3~", "0~5", "1.5", "0-5"):
        with pytest.raises(InvalidArgumentError, match="x is "):
            parse_lengths("x", wrong)


def test_random_jobs_repeat_themselves_and_share_their_prefix() -> None:
    lengths = parse_lengths("x", "5-9")
    jobs = list(islice(random_jobs(lengths, lengths, 4, 3), 20))
    assert jobs == list(islice(random_jobs(lengths, lengths, 4, 3), 20))
    assert jobs != list(islice(random_jobs(lengths, lengths, 4, 4), 20))
    words = [job.body["prompt"].split() for job in jobs]
    assert len({tuple(found[:4]) for found in words}) == 1
    assert len({tuple(found[4:]) for found in words}) > 15
    assert all(9 <= len(found) <= 13 for found in words)
    assert all(5 <= job.body["max_tokens"] <= 9 for job in jobs)


def test_jobs_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text(
        '{"prompt": "a", "max_tokens": 3}\n\n{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    first, second, third = islice(jobs_of_file(path, parse_lengths("x", "8"), 0), 3)
    assert first == third and first.path == "/v1/completions" and first.body["max_tokens"] == 3
    assert second.path == "/v1/chat/completions" and second.body["max_tokens"] == 8
    for wrong in ("", "{", "[]", '{"text": "a"}'):
        path.write_text(wrong)
        with pytest.raises(InvalidArgumentError, match=str(path)):
            next(jobs_of_file(path, parse_lengths("x", "8"), 0))


def test_arrivals_are_poisson() -> None:
    gaps = list(islice(poisson_gaps(50.0, 1), 20_000))
    assert abs(np.mean(gaps) - 0.02) < 0.001 and abs(np.std(gaps) - 0.02) < 0.001
    assert list(islice(poisson_gaps(math.inf, 1), 3)) == [0, 0, 0]


def record(start: float, times: list[float], tokens: int, **fields: object) -> Record:
    found = Record(start, times[-1] if times else start, times, [], 10, tokens, 200)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def test_figures_by_hand() -> None:
    good = record(1.0, [1.5, 1.6, 1.8], 3, num_cached_tokens=8)
    slow = record(2.0, [6.0, 6.5], 2)
    bad = [record(1.0, [], 0, status=429, error="full"), record(1.0, [1.1], 1, error="cut off")]
    measured = Measured(Load(4, 2), 5.0, (good, slow, *bad))
    found = summarize(measured, Slo(ttft=1.0, itl=0.2))
    assert (found["requests"], found["failed"]) == (4, 2)
    assert found["errors"] == {"status 429": 1, "cut off": 1}
    assert found["answer_tokens"] == 5 and found["answer_tokens_per_second"] == 1.0
    assert found["total_tokens_per_second"] == 5.0 and found["requests_per_second"] == 0.4
    assert found["ttft_ms"]["p50"] == 2250.0 and found["e2e_ms"]["p99"] > 4400
    assert found["itl_ms"]["mean"] == pytest.approx(1000 * (0.1 + 0.2 + 0.5) / 3, abs=0.01)
    assert found["slo_kept"] == 0.25 and found["goodput_requests_per_second"] == 0.2
    assert found["slo_ms"] == {"ttft": 1000.0, "itl": 200.0}
    assert found["cached_prompt_tokens"] == 8 and cached_share(found) == 0.4
    untold = summarize(Measured(Load(1, 1), 5.0, (slow,)))
    assert untold["cached_prompt_tokens"] is None and cached_share(untold) is None
    assert good.mean_gap == pytest.approx(0.15)
    json.dumps(found, allow_nan=False)


def test_slos() -> None:
    assert parse_slo("ttft:500,itl:50.5") == Slo(0.5, 0.0505)
    assert parse_slo("e2e:1000") == Slo(e2e=1.0)
    for wrong in ("", "ttft", "ttft:x", "tpot:5", "ttft:5;itl:4"):
        with pytest.raises(InvalidArgumentError, match="--slo is"):
            parse_slo(wrong)


def loads(*users: int, rate: float = math.inf) -> list[Measured]:
    records = tuple(record(i, [i + 0.1 * (i + 1), i + 2.0], 2) for i in range(9))
    return [Measured(Load(9, number, rate), 3.0, records) for number in users]


def test_plots_show_the_figures_with_their_units() -> None:
    measured = loads(1, 8)
    figure = draw(measured, [summarize(found) for found in measured], "title")
    first, between, whole, throughput = figure.axes
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels[0] == "Time to first token (ms)" and labels[3] == "Users"
    assert "(ms)" in labels[1] and "(ms)" in labels[2] and "tokens/s" in throughput.get_ylabel()
    times = [100.0 * (i + 1) for i in range(9)]
    for axes, expected in ((first, times), (between, [2000 - time for time in times])):
        for line in axes.get_lines():
            milliseconds, percent = line.get_data()
            at = [float(np.interp(p, percent, milliseconds)) for p in (0, 50, 100)]
            assert at == pytest.approx(
                [min(expected), 500 if axes is first else 1500, max(expected)]
            )
    assert [float(x) for x in whole.get_lines()[0].get_xdata()[[0, -1]]] == [2000.0, 2000.0]
    assert [list(map(float, found)) for found in throughput.get_lines()[0].get_data()] == [
        [1.0, 8.0],
        [6.0, 6.0],
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1 user", "8 users"]
    colours = {line.get_color() for line in first.get_lines()}
    assert len(colours) == 2


def test_plots_are_well_formed() -> None:
    measured = loads(1, 8)
    text = plot(measured, [summarize(found) for found in measured], "<m>: p & $n$")
    words = ["".join(found.itertext()) for found in ElementTree.fromstring(text).iter(f"{SVG}text")]
    assert "<m>: p & $n$" in words and "8 users" in words and "End-to-end latency (ms)" in words
    assert text == plot(measured, [summarize(found) for found in measured], "<m>: p & $n$")
    arrivals = loads(4, rate=2.0)
    assert len(draw(arrivals, [summarize(found) for found in arrivals], "one load").axes) == 3
    empty = [Measured(Load(1, 1), 1.0, ())]
    ElementTree.fromstring(plot(empty, [summarize(empty[0])], "nothing"))


def test_without_matplotlib_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("octavo.bench.serve_plot.find_spec", lambda name: None)
    # Nobody listens there: to measure would be another error.
    words = ["bench", "serve", "http://127.0.0.1:9", "--plot", str(tmp_path / "plot.svg")]
    assert main(words) == 2
    assert "pip install 'octavo[plot]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    llm = fake_llm(tmp_path_factory.mktemp("bench"))
    # Its tokenizer knows single characters alone: words would not be text to it.
    with listening(llm, served_names=("tiny",), api_keys=("k",)) as found:
        yield found


def jobs() -> Iterator[Job]:
    body = {"prompt": "ABCDE", "max_tokens": 6, "ignore_eos": True, "temperature": 0}
    while True:
        yield Job("/v1/completions", body)


@pytest.mark.parametrize("load", [Load(30, 4), Load(25, 50, 200.0)], ids=["closed", "poisson"])
def test_loads_against_a_real_socket(url: str, load: Load) -> None:
    most = 0

    def watch(done: int, running: int, tokens: int) -> None:
        nonlocal most
        most = max(most, running + 1)
        assert done <= load.num_requests and tokens <= 6 * load.num_requests

    async def test() -> Measured:
        client = Client(f"{url}/v1", "k")
        assert await client.model() == "tiny"
        return await run_load(client, "tiny", jobs(), load, 1, watch)

    measured = asyncio.run(test())
    found = summarize(measured)
    assert found["failed"] == 0 and len(measured.records) == load.num_requests
    assert most <= load.concurrency
    for own in measured.records:
        assert own.num_prompt_tokens == 5 and own.num_answer_tokens == 6
        assert len(own.text) == 6 and own.text == measured.records[0].text
        assert 1 <= len(own.chunk_times) <= 6 and own.ttft > 0 and own.e2e >= own.ttft
    if load.rate == 200.0:
        assert measured.seconds > 0.03  # 25 of them cannot come at once


def test_what_fails_is_counted_and_never_raised(url: str) -> None:
    async def test() -> None:
        client = Client(url, "k")
        assert (await client.ask(next(jobs()), "nobody")).status == 404
        stranger = await Client(url, "wrong").ask(next(jobs()), "tiny")
        assert stranger.status == 401 and not stranger.ok
        nobody = await Client("http://127.0.0.1:9").ask(next(jobs()), "tiny")
        assert nobody.error is not None and "ConnectionRefused" in nobody.error
        hasty = await Client(url, "k", timeout=1e-4).ask(next(jobs()), "tiny")
        assert hasty.error is not None and "Timeout" in hasty.error
        chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
        chat |= {"ignore_eos": True, "temperature": 0}  # an answer may end before its first text
        assert (await client.ask(Job("/v1/chat/completions", chat), "tiny")).ok
        with pytest.raises(OctavoError, match="start a server first"):
            await Client("http://127.0.0.1:9").model()

    asyncio.run(test())
    for wrong in ("ftp://x", "http://"):
        with pytest.raises(InvalidArgumentError, match="url is"):
            Client(wrong)


def test_the_command(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = tmp_path / "jobs.jsonl"
    dataset.write_text('{"prompt": "ABC", "ignore_eos": true}\n')
    result, drawing = tmp_path / "result.json", tmp_path / "plot.svg"
    arguments = ["bench", "serve", url, "--api-key", "k", "--dataset", str(dataset), "-n", "4"]
    more = ["-u", "1,3", "-r", "6", "--slo", "ttft:60000", "--json", str(result)]
    assert main([*arguments, *more, "--plot", str(drawing)]) == 0
    shown = capsys.readouterr().out
    assert "1 user" in shown and "3 users" in shown and "100 %" in shown
    content = json.loads(result.read_text())
    assert [load["concurrency"] for load in content["loads"]] == [1, 3]
    assert all(load["answer_tokens"] == 24 for load in content["loads"])
    assert content["asked"]["model"] == "tiny" and content["octavo"]
    ElementTree.fromstring(drawing.read_text())
    assert "prompt tokens cached, %" in shown and content["loads"][0]["cached_prompt_tokens"] == 0
    assert main(["bench", "serve", url, "--api-key", "wrong"]) == 2
    assert "status 401" in capsys.readouterr().err
    for wrong in (["-u", "0"], ["--rate", "-1"], ["-r", "-1"], ["-p", "x"], ["--slo", "x"]):
        assert main(["bench", "serve", url, "--api-key", "k", *wrong]) == 2


def test_a_second_run_does_not_find_the_first_ones_prompts_without_saying_so(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, result = tmp_path / "jobs.jsonl", tmp_path / "result.json"
    dataset.write_text(json.dumps({"prompt": "ABCD" * 16, "ignore_eos": True}))
    words = ["bench", "serve", url, "--api-key", "k", "-r", "2", "-u", "1", "--json", str(result)]
    seeds = set()
    for more in ([], [], ["--seed", "7"]):
        assert main([*words, "--dataset", str(dataset), "-n", "2", *more]) == 0
        shown = " ".join(capsys.readouterr().err.split())
        content = json.loads(result.read_text())
        seeds.add(content["asked"]["seed"])
        assert f"seed {content['asked']['seed']}" in shown
        # All but the last token of a prompt that was asked before the first that is measured.
        assert content["loads"][0]["cached_prompt_tokens"] == 2 * 63
        assert "1 user: 98% of the prompts' tokens were in the server's prefix cache" in shown
    assert len(seeds) == 3 and 7 in seeds


@pytest.mark.parametrize("option", ["--prompt-len", "--shared-prefix"])
def test_prompts_of_a_file_have_their_own_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    dataset = tmp_path / "jobs.jsonl"
    dataset.write_text('{"prompt": "ABC"}')
    assert main(["bench", "serve", "--dataset", str(dataset), option, "9"]) == 2
    assert f"{option} is 9, which does nothing here; expected it without --dataset" in (
        capsys.readouterr().err.replace("\n", " ")
    )
