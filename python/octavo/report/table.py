"""The tables of a report, as rows of text: the page and Markdown show the same ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from octavo.machine import format_bytes
from octavo.report.results import Results, Row

TITLES = {
    "decode": "Decoding, one sequence",
    "prefill": "A prompt, up to the first token of its answer",
    "requests": "Requests that arrive together, all their tokens",
    "batch": "Sequences together, tokens of their answers",
    "context": "Memory behind a long prompt",
    "latency": "One request: first token, and between tokens",
    "load": "A server under load",
}


@dataclass(frozen=True)
class Table:
    """A report's table; the first column is text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def is_number(self, index: int) -> bool:
        """Whether a column is aligned to the right."""
        cells = [row[index] for row in self.rows]
        return index > 0 and all(cell[:1] in "0123456789-+." for cell in cells)


def size_of(row: Row) -> str:
    """How much a row asks for, in words."""
    prompt, tokens = f"{row.prompt:,} in", f"{row.tokens:,} out"
    if row.measure == "prefill":
        return f"{row.prompt:,} tokens"
    if row.measure == "load":
        plural = "s" * (row.users != 1)
        return f"{row.users} user{plural}" if row.users else f"{row.rate:g} requests/s"
    return f"{row.requests} × {prompt}, {tokens}" if row.requests > 1 else f"{prompt}, {tokens}"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits; whole where it is large; "-" for none."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.01:
        return f"{value:.{digits}g}"
    return f"{value:.{2 if abs(value) < 10 else 1}f}"


def spread(row: Row) -> str:
    """The least and the most of several rounds, and how many there were."""
    if len(row.samples) == 1:
        return "one round"
    return f"{number(min(row.samples))} to {number(max(row.samples))} ({len(row.samples)})"


def is_octavo(system: str) -> bool:
    """Whether a system is octavo, in any format."""
    return system.startswith("octavo")


def speed_table(results: Results, model: str, measure: str) -> Table:
    """Median, spread and nearness to the limit of every row of a measure."""
    rows = results.of(model, measure)
    sizes = {size_of(row) for row in rows}
    title, heads = TITLES[measure], ["system", "size", rows[0].unit]
    if len(sizes) == 1:  # it stands once, in the title
        title, heads = f"{title}: {sizes.pop()}", [heads[0], heads[2]]
    heads += ["least to most (rounds)", "% of limit"]
    return Table(title, tuple(heads), tuple(_speed_cells(row, "size" in heads) for row in rows))


def _speed_cells(row: Row, with_size: bool) -> tuple[str, ...]:
    percent = "-"
    if row.percent_of_limit is not None:
        percent = f"{row.percent_of_limit:.0f}" + (f" ({row.limit})" if row.limit else "")
    size = [size_of(row)] if with_size else []
    return (row.system, *size, number(row.median), spread(row), percent)


def ratio_table(results: Results, model: str, measure: str) -> Table | None:
    """octavo's speed over each peer's: the median of the rounds' ratios, with least and most.

    The best peer is the fastest one that spends no fewer bits on a weight.
    """
    rows = results.of(model, measure)
    most = max(row.requests for row in rows)
    rows = [row for row in rows if row.requests == most]
    peers = [row for row in rows if not is_octavo(row.system)]
    ours = [row for row in rows if is_octavo(row.system)]
    if not peers or not ours:
        return None
    bits = {each.system: each.bits or 0.0 for each in results.systems if each.model == model}
    made = []
    for row in ours:
        fair = [peer for peer in peers if bits.get(peer.system, 0) >= bits.get(row.system, 99)]
        best = max(fair, key=lambda peer: peer.median) if fair else None
        last = f"{best.system}: {ratio(row, best)}" if best else "-"
        made.append((row.system, *(ratio(row, peer) for peer in peers), last))
    heads = ("octavo is, times", *(peer.system for peer in peers), "best peer at no fewer bits")
    return Table(f"{TITLES[measure]}: octavo beside the others", heads, tuple(made))


def ratio(ours: Row, theirs: Row) -> str:
    """ "1.66 (1.52 to 1.74)", of the rounds that both took part in."""
    found = [a / b for a, b in zip(ours.samples, theirs.samples, strict=False) if b]
    if not found:
        return "-"
    text = f"{statistics.median(found):.2f}"
    return text if len(found) == 1 else f"{text} ({min(found):.2f} to {max(found):.2f})"


def context_table(results: Results, model: str) -> Table:
    """The most memory behind each length of prompt."""
    rows = results.of(model, "context")
    heads = ("system", "prompt, tokens", "host, most", "device, most")
    made = [
        (row.system, f"{row.prompt:,}", _bytes(row.host_bytes), _bytes(row.device_bytes))
        for row in rows
    ]
    return _without_empty(TITLES["context"], heads, made)


def latency_table(results: Results, model: str, measure: str) -> Table:
    """Percentiles of the first token and between tokens, in milliseconds.

    The speed under load is of prompts and answers together.
    """
    speed = "prompt and answer tokens/s" if measure == "load" else "tokens/s"
    heads = ("system", "size", "first p50, ms", "p99", "between p50, ms", "p99", speed)
    made = []
    for row in results.of(model, measure):
        first, between = row.first_ms, row.between_ms
        times: list[float | None] = []
        for found in (first, between):
            times += [None, None] if found is None else [found.p50, found.p99]
        cells = (number(time) for time in times)
        made.append((row.system, size_of(row), *cells, number(row.median)))
    return Table(TITLES[measure], heads, tuple(made))


def quality_table(results: Sequence[Results], model: str) -> Table:
    """What every format costs, of all files together."""
    heads = ("system", "bits of a weight", "perplexity", "beside float32", "mean KL, nats", "99 %")
    made = []
    for each in sorted(
        (q for r in results for q in r.quality if q.model == model),
        key=lambda q: (q.system.split()[0], q.bits),
    ):
        ratio_text = f"{100 * (each.perplexity_ratio - 1):+.2f} %" if each.perplexity_ratio else "-"
        kls = (number(each.mean_kl), number(each.p99_kl))
        made.append((each.system, f"{each.bits:.2f}", f"{each.perplexity:.4f}", ratio_text, *kls))
    return Table("What a format costs", heads, tuple(made))


def system_table(results: Results, model: str) -> Table | None:
    """Loading, memory and gate of every system; None where nothing of it is known."""
    heads: tuple[str, ...] = ("system", "version", "weights", "starts in", "loads in")
    heads += ("host, most", "device, most", "gate")
    made = []
    for each in results.systems:
        if each.model == model:
            seconds = [f"{s:.1f} s" if s else "-" for s in (each.start_seconds, each.load_seconds)]
            memory = [_bytes(b) for b in (each.host_bytes, each.device_bytes)]
            first = (each.system, each.version or "-", _bytes(each.weight_bytes))
            made.append((*first, *seconds, *memory, gate_of(each.gate)))
    table = _without_empty(f"The systems, {model}", heads, made)
    return table if len(table.headings) > 1 else None


def _without_empty(title: str, heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table without the columns in which nothing is told."""
    keep = [0, *(i for i in range(1, len(heads)) if any(row[i] != "-" for row in rows))]
    kept = tuple(tuple(row[i] for i in keep) for row in rows)
    return Table(title, tuple(heads[i] for i in keep), kept)


def gate_of(gate: object) -> str:
    """What was checked before it was timed."""
    if not isinstance(gate, dict) or not gate:
        return "-"
    parts = [] if "passed" not in gate else ["passed" if gate["passed"] else "FAILED"]
    if "logprob_error" in gate:
        parts.append(f"{gate['logprob_error']:.1g} from float32")
    return "; ".join(parts or [str(gate.get("how", "-"))])


def _bytes(count: int | None) -> str:
    return "-" if not count else format_bytes(count)


def energy_table(results: Results, model: str) -> Table | None:
    """Joules of a token; None where the machine counted none."""
    made = [
        (
            row.system,
            row.measure,
            size_of(row),
            number(row.cpu_joules_per_token),
            number(row.gpu_joules_per_token),
        )
        for row in results.rows
        if row.model == model and (row.cpu_joules_per_token or row.gpu_joules_per_token)
    ]
    heads = ("system", "measure", "size", "processor, J a token", "GPU, J a token")
    return Table("Energy", heads, tuple(made)) if made else None


def gap_table(results: Results) -> Table | None:
    """What is not there; what has one reason stands in one row."""
    parts: dict[tuple[str, str, str], list[str]] = {}
    for each in results.gaps:
        parts.setdefault((each.model, each.system or "all", each.why), []).append(each.what)
    systems: dict[tuple[str, str, str], list[str]] = {}
    for (model, system, why), whats in parts.items():
        systems.setdefault((model, "; ".join(whats), why), []).append(system)
    made = tuple(("; ".join(names), *rest) for rest, names in systems.items())
    return Table("Gaps", ("systems", "model", "what", "why"), made) if made else None


def machine_lines(results: Results) -> list[tuple[str, str]]:
    """The machine behind the figures, as far as the file tells it: name, value."""
    m = results.machine
    native = m.get("native") or {}
    versions = {"Python": m.get("python"), **(m.get("versions") or {})}
    isa = m.get("instruction_set")
    clocks = f"{m['mhz']:,.0f} MHz" if m.get("mhz") else ""
    clocks += f" of {m['mhz_at_most']:,.0f}" if m.get("mhz_at_most") else ""
    known = [
        ("processor", str(m.get("processor", ""))),
        ("threads", str(m.get("num_threads") or "")),
        ("ranks", str(m["ranks"]) if m.get("ranks", 1) > 1 else ""),
        ("instruction set", str(native.get("isa", "") if isa in (None, "auto") else isa)),
        ("NUMA nodes", str(m.get("numa_nodes") or "")),
        ("memory", format_bytes(m["memory_bytes"]) if m.get("memory_bytes") else ""),
        ("clocks", clocks),
        ("governor", str(m.get("governor", ""))),
        ("load before", f"{m['load']:.2f}" if "load" in m else ""),
        *(("GPU", line) for line in m.get("gpus", ())),
        ("system", str(m.get("system", ""))),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v)),
        ("compiler", str(native.get("compiler", ""))),
        ("commit", str(m.get("commit", ""))),
        ("job", ", ".join(f"{k} {v}" for k, v in (m.get("job") or {}).items())),
        ("date", str(m.get("date", ""))),
    ]
    return [(name, value) for name, value in known if value and value != "not told"]


def tables_of(results: Results, model: str) -> Iterator[Table]:
    """All tables of one model in one file."""
    for measure in ("decode", "prefill", "requests", "batch"):
        if results.of(model, measure):
            yield speed_table(results, model, measure)
            beside = ratio_table(results, model, measure)
            if beside is not None:
                yield beside
    if results.of(model, "context"):
        yield context_table(results, model)
    for measure in ("latency", "load"):
        if results.of(model, measure):
            yield latency_table(results, model, measure)
    if any(each.model == model for each in results.quality):
        yield quality_table([results], model)
    for table in (energy_table(results, model), system_table(results, model)):
        if table is not None:
            yield table
