"""What a user sees: the terminal report, the JSON, the page, the command and its exit codes."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from diff_helpers import (
    MISTAKES,
    broken_reference,
    compare,
    good_reference,
    random_weights,
    small_spec,
    write_model,
)
from rich.console import Console

from octavo.cli import main
from octavo.diff.html import LOG_HIGH, LOG_LOW, pack, render
from octavo.diff.measure import row_errors
from octavo.diff.op_sources import _TAP_HINTS, OP_SOURCES, hint_for
from octavo.diff.report import print_report, to_json
from octavo.diff.texts import cosine, number
from octavo.errors import FileError
from octavo.files import write_text
from octavo.models.layer import Matrix, Node, Op, model_nodes, tap_names
from octavo.models.spec import MoeSpec

SPEC = small_spec(num_layers=4)
WEIGHTS = random_weights(SPEC)
ROOT = Path(__file__).resolve().parents[2]


def good_result() -> Any:
    return compare(good_reference(SPEC, WEIGHTS), good_reference(SPEC, WEIGHTS), SPEC, WEIGHTS)


def broken_result(mistake: str = "no scale", **options: Any) -> Any:
    left = broken_reference(mistake, SPEC, WEIGHTS)
    return compare(left, good_reference(SPEC, WEIGHTS), SPEC, WEIGHTS, **options)


def printed(result: Any, width: int = 110, **options: Any) -> str:
    console = Console(width=width, color_system=None, file=io.StringIO(), emoji=False, markup=False)
    print_report(result, console=console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---- measures ----


def test_row_errors_are_the_textbook_figures() -> None:
    generator = np.random.default_rng(5)
    left = generator.standard_normal((7, 33)).astype(np.float32)
    right = (left + 1e-3 * generator.standard_normal((7, 33))).astype(np.float32)
    left64, right64 = left.astype(np.float64), right.astype(np.float64)
    errors = row_errors(left, right)
    norms = np.maximum(np.linalg.norm(left64, axis=1), np.linalg.norm(right64, axis=1))
    np.testing.assert_allclose(
        errors.relative, np.linalg.norm(left64 - right64, axis=1) / norms, rtol=1e-4
    )
    np.testing.assert_allclose(errors.max_abs, np.abs(left64 - right64).max(axis=1), rtol=1e-4)
    dots = (left64 * right64).sum(axis=1)
    cosines = dots / np.linalg.norm(left64, axis=1) / np.linalg.norm(right64, axis=1)
    np.testing.assert_allclose(errors.cosine_gap, 1 - cosines, rtol=1e-3, atol=1e-12)


def test_row_errors_at_the_edges() -> None:
    zero, one = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    bad = np.array([[1, np.nan, 3, np.inf]], np.float32)
    assert row_errors(zero, zero).relative[0] == 0 and row_errors(zero, zero).cosine_gap[0] == 0
    assert row_errors(zero, one).relative[0] == 1 and row_errors(zero, one).cosine_gap[0] == 1
    assert row_errors(-one, one).cosine_gap[0] == pytest.approx(2)
    assert row_errors(bad, one).relative[0] == np.inf
    assert row_errors(bad, bad).relative[0] == 0, "the same bits are the same result"
    with pytest.raises(ValueError, match="equal shape"):
        row_errors(one, np.ones((2, 4), np.float32))


def test_numbers_are_short() -> None:
    assert [number(x) for x in (0.0, 2.34e-5, 0.264, 3.25, 75.0, 1.2e7, np.inf, None)] == [
        *("0", "2.3e-5", "0.26", "3.2", "75", "1.2e7", "not finite", "-"),
    ]
    assert [cosine(x) for x in (0.0, 3e-11, 0.25)] == ["1", "1-3.0e-11", "0.75000"]


# ---- pointers into the repository ----


def test_every_op_has_its_files_and_they_exist() -> None:
    fields: list[dict[str, Any]] = [{}, {"qk_norm": "head"}, {"moe": MoeSpec(4, 2)}]
    nodes = [node for some in fields for node in model_nodes(small_spec(**some))]
    assert set(OP_SOURCES) == set(get_args(Op)) == {node.op for node in nodes}
    assert set(_TAP_HINTS) <= {node.part for node in nodes}
    reference = (ROOT / "reference" / "ops.py").read_text()
    for op, sources in OP_SOURCES.items():
        assert f"def {op}(" in reference
        paths = re.findall(r"[\w/]+\.(?:cpp|h)", sources.cpu)
        text = "".join((ROOT / path).read_text() for path in paths)
        name = f"CpuBackend::{op}("
        assert name in text, f"{op} points at {paths}, where {name}) is not"
        for path in re.findall(r"[\w/]+\.(?:cu|cpp|h)", sources.cuda):
            assert (ROOT / path).is_file(), path


def test_a_tap_that_nobody_knows_has_the_hint_of_its_op() -> None:
    node = Node("layers.2.other", "linear", ("layers.2.mlp_norm",), 8, (Matrix("x", 8, 36),))
    assert hint_for(node) == OP_SOURCES["linear"].hint
    hints = {node.part: hint_for(node) for node in model_nodes(SPEC)}
    assert "GGUF" in hints["q"] and "tied" in hints["logits"] and "gate" in hints["act"]


# ---- the terminal ----


def test_report_of_equal_runs_folds_the_layers() -> None:
    text = printed(good_result())
    assert "no difference" in text and "layers.0  14 taps" in text
    assert "layers.0.q " not in text and "layers.0.q " in printed(good_result(), show_all=True)


def test_report_marks_the_first_tap_and_names_the_op() -> None:
    text = printed(broken_result())
    assert "▶ layers.0.attn " in text and text.count("▶") == 1
    assert "broken's attention is wrong" in text and "no scale" in text
    assert "reference/ops.py (attention)" in text and text.rstrip().endswith("s")
    assert "different" in text and "layers.3  14 taps" in text
    assert "Usually the scale" in printed(broken_result("blind to itself")), "not recognized: hint"


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_report_fits_any_terminal(width: int) -> None:
    for result in (good_result(), broken_result("residual dropped")):
        lines = printed(result, width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert any("layers.1" in line for line in lines)


def test_red_is_what_is_wrong() -> None:
    red = "\x1b[1;31m"
    for result in (good_result(), broken_result()):
        console = Console(
            force_terminal=True, color_system="standard", file=io.StringIO(), width=110
        )
        print_report(result, console=console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        is_red = {line.strip("\x1b[0123456789;m ▶").split()[0] for line in lines if red in line}
        assert ("embed" in is_red, bool(is_red)) == (False, not result.ok)
        assert result.ok or result.first_bad.name in "".join(lines).split(red)[1]


def test_report_without_unicode() -> None:
    class Ascii(Console):
        @property
        def encoding(self) -> str:
            return "ascii"

    console = Ascii(width=100, color_system=None, file=io.StringIO())
    print_report(broken_result(), console=console)
    console.file.getvalue().encode("ascii")  # type: ignore[attr-defined]


def test_report_of_different_greedy_tokens() -> None:
    text = printed(broken_result("gate and up swapped"))
    assert "takes" in text and "margin" in text


# ---- JSON ----

# What scripts may rely on.
KEYS = """schema ok first_bad model left_name right_name left_description right_description dtype
    token_ids token_texts missing logits greedy greedy_texts decode findings seconds taps judge"""
TAP_KEYS = """name layer part relative max_abs cosine_gap position growth own_left own_right
    tolerance own_tolerance_left own_tolerance_right cosine ok parted left_broken right_broken"""


def test_json_is_strict_and_complete() -> None:
    for result in (good_result(), broken_result()):
        document = json.loads(to_json(result), parse_constant=lambda name: pytest.fail(name))
        assert document["ok"] is result.ok
        assert [tap["name"] for tap in document["taps"]] == tap_names(SPEC)
        assert set(document) == set(KEYS.split())
        assert set(document["taps"][0]) == set(TAP_KEYS.split())
    assert document["first_bad"] == "layers.0.attn"
    assert document["findings"][0]["op"] == "attention"


def test_json_has_no_infinities() -> None:
    weights = {**WEIGHTS, "layers.1.up.weight": np.full_like(WEIGHTS["layers.1.up.weight"], np.nan)}
    result = compare(good_reference(SPEC, weights), good_reference(SPEC, WEIGHTS), SPEC, WEIGHTS)
    document = json.loads(to_json(result), parse_constant=lambda name: pytest.fail(name))
    assert document["first_bad"] == "layers.1.up" and not document["ok"]
    render(result)


# ---- the page ----


class Page(HTMLParser):
    """Collects what the tests look at; complains about tags that are not closed in order."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_page_is_well_formed_and_asks_no_host(mistake: str | None) -> None:
    text = render(good_result() if mistake is None else broken_result(mistake))
    page = Page(text)
    without_figures = re.sub(r'"codes": "[^"]*"', "", text)  # base64 may hold anything
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<img|src=", without_figures)
    assert "default-src 'none'" in text
    assert "<!--slot" not in text
    ids = [attributes["id"] for _, attributes in page.attributes if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.attributes:
        if label := attributes.get("aria-labelledby"):
            assert label in ids
    canvases = [attributes for tag, attributes in page.attributes if tag == "canvas"]
    for canvas in canvases:
        if "aria-hidden" not in canvas:
            assert canvas["tabindex"] == "0" and canvas["aria-label"], "reachable by keyboard"


def test_page_says_what_is_wrong_without_its_script() -> None:
    text = " ".join(Page(render(broken_result())).text)
    assert "different" in text and "broken's attention is wrong" in text
    assert "layers.0.attn" in text and "layers.3" in text


def _data(page: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert match is not None
    return json.loads(match.group(1))


def test_page_holds_the_figures_of_every_tap_and_position() -> None:
    result = broken_result(count=23)
    data = _data(render(result))
    assert len(data["bin_starts"]) == 23 and data["first_bad"] == "layers.0.attn"
    assert [metric["id"] for metric in data["metrics"]] == ["relative", "own_left"]
    codes = np.frombuffer(base64.b64decode(data["metrics"][0]["codes"]), "<u2")
    codes = codes.reshape(len(data["taps"]), 23)
    for index, tap in enumerate(data["taps"]):
        expected = result.rows[tap["name"]].errors.relative
        assert ((codes[index] == 0) == (expected == 0)).all()
        logs = LOG_LOW + (codes[index].astype(float) - 2) / 65532 * (LOG_HIGH - LOG_LOW)
        there = expected > 0
        np.testing.assert_allclose(10 ** logs[there], expected[there], rtol=1e-3)


def test_page_puts_positions_of_a_long_text_together() -> None:
    result = compare(
        good_reference(SPEC, WEIGHTS),
        broken_reference("no scale", SPEC, WEIGHTS),
        SPEC,
        WEIGHTS,
        count=530,
        steps=0,
        decode_rows=0,
    )
    data = _data(render(result))
    assert len(data["bin_starts"]) == 512 and data["bin_starts"][-1] < 530
    codes = np.frombuffer(base64.b64decode(data["metrics"][0]["codes"]), "<u2")
    logits = codes.reshape(len(data["taps"]), 512)[-1].max()
    assert logits == np.frombuffer(pack(np.array([result.taps[-1].relative])), "<u2")[0]


def test_page_escapes_what_models_and_tokens_say() -> None:
    result = good_result()
    object.__setattr__(result, "model", "<b>&")
    object.__setattr__(result, "token_texts", ("</script><script>alert(1)</script>",) * 23)
    text = render(result)
    assert "<b>&" not in text and "alert(1)</script>" not in text
    assert _data(text)["tokens"][0].startswith("</script>")


def test_page_is_written_whole_or_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", "the page", render(good_result()))
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(FileError, match="nowhere is no directory; make it first"):
        write_text(tmp_path / "nowhere" / "page.html", "the page", render(good_result()))


# ---- the command ----


def test_command_finds_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    page = tmp_path / "page.html"
    assert main(["diff", str(model), "--random", "30", "--steps", "4", "--html", str(page)]) == 0
    output = capsys.readouterr().out
    assert "no difference" in output and "bit-identical to prefill" in output
    assert "native core" in output and page.is_file()


def test_command_reports_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    arguments = ["diff", str(model), "--random", "30", "--tolerance", "1e-9", "--json"]
    assert main(arguments) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"] and document["findings"][0]["side"] == ""
    assert "tolerance asked for is too tight" in document["findings"][0]["evidence"]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_command_judges_with_dummy_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    arguments = ["diff", str(model), "--load-format", "dummy", "--judge", "--dtype", dtype]
    assert main(arguments) == 0
    assert "judge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "llama.cpp"], "expected one of reference, hf"),
        (["--dtype", "f16"], "expected one of f32, bf16"),
        (["--random", "0"], "expected 1 or more"),
        (["--random", "3", "--prompt", "x"], "expected one"),
        (["--prompt", ""], "prompt is empty"),
        (["--steps", "-1"], "expected 0 or more"),
        (["--tolerance", "nan"], "expected a relative error"),
        (["--random", "250", "--steps", "16"], "the model has room for 256"),
        (["--device", "tpu"], "device"),
        (["--random", "x"], "--random"),
    ],
)
def test_command_refuses_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    model = write_model(tmp_path / "model")
    assert main(["diff", str(model), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error


def test_command_refuses_a_missing_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_command_says_how_to_get_hugging_face(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    model = write_model(tmp_path / "model")
    assert main(["diff", str(model), "--against", "hf"]) == 2
    assert "pip install torch transformers" in " ".join(capsys.readouterr().err.split())
