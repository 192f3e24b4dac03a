"""Results of octavo's other tools in the form that `results.schema.json` describes.

What a file does not hold stays out; the report says so where a plot would need it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from octavo.errors import InvalidArgumentError

Content = Mapping[str, Any]
# What comes of a file that lacks a part, or has another in its place.
_DAMAGES = (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError)
_FORMATS = {"f32": 32.0, "bf16": 16.0, "int8": 8.0, "w8a8": 8.0, "q8_0": 8.5, "int4": 4.5}
_FORMATS |= {"q4_0": 4.5, "int4-g128": 4.125, "Q8_0": 8.5, "Q4_0": 4.5}


def convert(content: Content, where: str) -> dict[str, Any]:
    """The results in the one form. where: the file. Raises InvalidArgumentError for others."""
    for belongs, made in _KINDS:
        if belongs(content):
            try:
                return made(content)
            except _DAMAGES as error:
                raise InvalidArgumentError(
                    f"{where} looks like results of {made.__name__.strip('_')}, but is not whole: "
                    f"{type(error).__name__} {error}; expected the file as octavo wrote it"
                ) from error
    raise InvalidArgumentError(
        f"{where} holds no results that octavo report reads (its keys: "
        f"{', '.join(list(content)[:6]) or 'none'}); expected a file of benchmarks/run.py, "
        "benchmarks/gpu.sh or llama_quality.py, or the JSON of octavo bench, bench serve or eval"
    )


def _made(title: str, machine: Content, **more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"models": [], "systems": [], "rows": [], "quality": [], "gaps": []}
    return {"title": title, "machine": machine, **empty, **more}


def _system(model: str, name: str, **more: Any) -> dict[str, Any]:
    """An entry of "systems" by a name such as "octavo int8"."""
    engine, _, rest = name.partition(" ")
    form = next((word for word in rest.split() if word in _FORMATS), "")
    found = {"model": model, "system": name, "engine": engine, "format": form, "gate": {}}
    return {**found, **({"bits": _FORMATS[form]} if form else {}), **more}


def _row(model: str, system: str, measure: str, samples: Iterable[float], **more: Any) -> Any:
    found = {"model": model, "system": system, "measure": measure, "samples": list(samples)}
    return {**found, "prompt": 0, "tokens": 1, "requests": 1, "unit": "tokens/s", **more}


def _compare_cpu(content: Content) -> dict[str, Any]:
    model, asked = content["model"], content["arguments"]
    sizes = {
        "decode": {"prompt": 1, "tokens": int(asked["generate"])},
        "prefill": {"prompt": int(asked["prompt"])},
        "serve": {
            "prompt": int(asked["request_prompt"]),
            "tokens": int(asked["request_generate"]),
            "requests": int(asked["requests"]),
        },
    }
    systems = []
    for name, check in content["checks"].items():
        gates = [
            part["passed"] for part in check.values() if isinstance(part, dict) and "passed" in part
        ]
        gate: dict[str, Any] = {"passed": all(gates)} if gates else {}
        error = content.get("logprob_errors", {}).get(name)
        gate |= {} if error is None else {"logprob_error": error}
        more = {k: check[k] for k in ("num_parameters", "weight_bytes") if k in check}
        limits = content.get("limits", {}).get(name, {})
        systems.append(_system(model, name, gate=gate, limits=limits, **more))
    rows = []
    for measure, of_systems in content["tokens_per_second"].items():
        for name, samples in of_systems.items():
            found = content["summary"][measure][name]
            more = {key: found.get(key) for key in ("percent_of_limit", "limit")}
            kind = "requests" if measure == "serve" else measure
            rows.append(_row(model, name, kind, samples, **sizes[measure], **more))
    gaps = [_gap(model, name, "all of it", why) for name, why in content["absent"].items()]
    gaps += [_gap(model, name, row, why) for row, name, why in content.get("not_measured", ())]
    machine = {**content["machine"], "instruction_set": content.get("isa", "auto")}
    return _made(f"{model} on one CPU", machine, systems=systems, rows=rows, gaps=gaps)


def _gap(model: str, system: str, what: str, why: str) -> dict[str, str]:
    return {"model": model, "system": system, "what": what, "why": why}


def _compare_hf(content: Content) -> dict[str, Any]:
    asked, systems, rows = content["arguments"], [], []
    model = asked["model"]
    for form in asked["dtypes"].split(","):
        found = content[form]
        for side, name in (("octavo", f"octavo {form}"), ("hugging face", f"transformers {form}")):
            gate = {"passed": found["gate"]["passed"]} if side == "octavo" else {}
            gate |= {"logprob_error": found["gate"]["logprob_errors"][side]}
            systems.append(_system(model, name, gate=gate))
            for kind, speeds in found["tokens_per_second"].items():
                samples, ceiling = speeds[side], found["ceilings"][kind]
                sizes = {
                    "decode": {"prompt": asked["prompt_tokens"], "tokens": asked["new_tokens"]},
                    "prefill": {"prompt": asked["prefill_tokens"]},
                }[kind]
                percent = 100 * statistics.median(samples) / ceiling
                limit = "memory" if kind == "decode" else "arithmetic"
                more = {**sizes, "percent_of_limit": percent, "limit": limit}
                rows.append(_row(model, name, kind, samples, **more))
    return _made(f"{model} beside transformers", content["machine"], systems=systems, rows=rows)


def _compare_serving(content: Content) -> dict[str, Any]:
    model, rows = content["asked"]["model"], []
    groups: dict[tuple[str, int], list[Content]] = {}
    for each in content["rounds"]:
        groups.setdefault((each["side"], each["concurrency"]), []).append(each)
    for (side, users), found in groups.items():
        latencies = {
            to: {p: statistics.median(each[of][p] for each in found) for p in ("p50", "p90", "p99")}
            for to, of in (("first_ms", "ttft_ms"), ("between_ms", "itl_ms"))
        }
        one = found[0]
        more = {"prompt": round(one["prompt_tokens"] / one["requests"]), "users": users}
        more |= {"tokens": round(one["answer_tokens"] / one["requests"])}
        samples = [each["total_tokens_per_second"] for each in found]
        more |= {"requests": one["requests"]}
        rows.append(_row(model, _server(side), "load", samples, **more, **latencies))
    starts: dict[str, list[float]] = {}
    for each in content["rounds"]:
        starts.setdefault(_server(each["side"]), []).append(each["start_seconds"])
    systems = [
        _system(model, name, start_seconds=statistics.median(seconds))
        for name, seconds in starts.items()
    ]
    return _made(f"{model} served", content, systems=systems, rows=rows)


def _server(side: str) -> str:
    """ "octavo --quantize int8" -> "octavo int8", "llama-server m-bf16" -> "llama.cpp bf16"."""
    form = next((f for f in sorted(_FORMATS, key=len, reverse=True) if f in side), "bf16")
    return f"{side.split()[0].replace('llama-server', 'llama.cpp').replace('vLLM', 'vllm')} {form}"


def _gpu(content: Content) -> dict[str, Any]:
    """One JSON file of benchmarks/gpu.sh: parts named headline-bf16, batch-int8, mixed-bf16 …"""
    model, rows = "llama-3.2-1b", []
    systems: dict[str, dict[str, Any]] = {}
    stamp = next(part["stamp"] for part in content.values() if "stamp" in part)
    native = stamp["native"]
    device = native["device_name"]
    machine = {
        **stamp,
        "processor": device,
        "num_threads": None,
        "gpus": [
            f"{device}, CUDA {native['cuda_runtime']}, driver {native['cuda_driver']}; clocks now "
            f"and at most, memory's, watts now and at most, Celsius, driver: {stamp['clocks']}"
        ],
    }
    limits = content.get("limits", {})
    flops = max(limits.get("mma_flops", 0.0), limits.get("cublas_flops", 0.0))
    roof = (
        {
            "bandwidth": limits["read_bytes_per_second"],
            "flops": flops,
            "arithmetic": "bf16 products",
        }
        if limits
        else {}
    )
    kinds = {"headline": "decode", "decode": "decode", "batch": "batch", "prefill": "prefill"}
    for name, part in content.items():
        kind, _, mark = name.partition("-")
        if kind == "mixed":
            speed, least = part["answer_tokens_per_second"], part.get("least_seconds")
            sizes = {"prompt": part["prompt_tokens"] // 256, "tokens": part["answer_tokens"] // 256}
            more = {**sizes, "requests": 256, "unit": "answer tokens/s"}
            more |= {"percent_of_limit": 100 * least / part["seconds"] if least else None}
            measured = [_row(model, f"octavo {mark} cuda", "requests", [speed], **more)]
        elif kind in kinds:
            measured = [
                _bench_row(model, f"octavo {mark} cuda", kinds[kind], row)
                for row in part["rows"]
                if row["samples"]
            ]
        else:
            continue
        gate: dict[str, Any] = {"how": f"the device's tests: {part['gate']}"}
        passed = [row["gate"]["passed"] for row in part.get("rows", ())]
        gate |= {"passed": all(passed)} if passed else {}
        made = _system(model, f"octavo {mark} cuda", gate=gate, device="cuda", limits=roof)
        systems.setdefault(made["system"], made)
        rows += measured
    return _made(
        f"Llama-3.2-1B's shape on one {device}", machine, systems=[*systems.values()], rows=rows
    )


def _bench_row(model: str, system: str, measure: str, row: Content) -> Any:
    """A row of `octavo bench`."""
    case, speed = row["case"], statistics.median(row["samples"])
    seconds = case["num_tokens"] * case["batch"] / row["mean"]
    work = {
        "bytes": row["bytes_per_second"] * seconds,
        "operations": row["flops"] * seconds,
        "operations_per_second": row["flops"] * speed / row["mean"],
    }
    is_prompt = case["kind"] == "prefill"
    sizes = {
        "prompt": case["num_tokens"] if is_prompt else case["depth"],
        "tokens": 1 if is_prompt else case["num_tokens"],
        "requests": case["batch"],
    }
    limits = {key: row[key] for key in ("percent_of_limit", "limit")}
    return _row(model, system, measure, row["samples"], **sizes, **work, **limits)


def _octavo_bench(content: Content) -> dict[str, Any]:
    model, form = content["model"], content["weights"]
    on = " cuda" if content["device"] == "cuda" else ""
    name, loading = f"octavo {form}{on}", content.get("loading") or {}
    rows = [
        _bench_row(model, name, _measure_of(row["case"]), row)
        for row in content["rows"]
        if row["samples"]
    ]
    peak = content.get("peak") or {}
    system = _system(
        *(model, name),
        gate={"passed": all(row["gate"]["passed"] for row in content["rows"])},
        device=content["device"],
        weight_bytes=content["weight_bytes"],
        load_seconds=loading.get("seconds"),
        host_bytes=loading.get("resident_bytes_at_most"),
        limits={key: peak[key] for key in ("bandwidth", "flops", "arithmetic") if key in peak},
    )
    keys = ("date", "processor", "num_threads", "native")
    machine = {key: content[key] for key in keys}
    machine["ranks"] = content.get("tensor_parallel_size", 1)
    return _made(f"octavo bench: {model}", machine, systems=[system], rows=rows)


def _measure_of(case: Content) -> str:
    if case["kind"] == "prefill":
        return "prefill"
    return "decode" if case["batch"] == 1 else "batch"


def _bench_serve(content: Content) -> dict[str, Any]:
    model = content["asked"]["model"]
    rows = [
        _row(
            *(model, "octavo served", "load", [each["total_tokens_per_second"]]),
            prompt=round(each["prompt_tokens"] / max(1, each["requests"])),
            tokens=round(each["answer_tokens"] / max(1, each["requests"])),
            requests=each["requests"],
            users=None if each["rate"] else each["concurrency"],
            rate=each["rate"],
            first_ms=each["ttft_ms"],
            between_ms=each["itl_ms"],
        )
        for each in content["loads"]
    ]
    machine = {"processor": content["client"], "date": "not told", "num_threads": None}
    machine["versions"] = {"octavo": content["octavo"]}
    systems = [_system(model, "octavo served")]
    return _made(f"octavo bench serve: {model}", machine, systems=systems, rows=rows)


def quality_of_eval(content: Content) -> dict[str, Any]:
    """An entry of "quality" from `octavo eval --json`: model, system and what the format costs."""
    run, against, apart = content["model"], content["against"], content["divergence"] or {}
    is_float32 = against is not None and against["weights"] == "f32"
    if is_float32 and against["weight_bytes"]:
        bits = 32 * run["weight_bytes"] / against["weight_bytes"]
    else:
        bits = _FORMATS.get(run["weights"].split()[0], 16.0)
    return {
        "model": run["path"].rstrip("/").rpartition("/")[2],
        "system": f"octavo {run['weights']}",
        "bits": round(bits, 3),
        "bytes": run["weight_bytes"],
        "perplexity": run["perplexity"]["value"],
        "perplexity_ratio": apart.get("perplexity_ratio"),
        "mean_kl": apart.get("mean_kl"),
        "p99_kl": apart.get("p99_kl"),
        "top_agreement": apart.get("top_agreement"),
        "text": f"{content['text']}, {content['num_scored']} tokens",
    }


def _octavo_eval(content: Content) -> dict[str, Any]:
    found = quality_of_eval(content)
    machine = {"processor": "not told", "date": "not told", "num_threads": None}
    return _made(f"octavo eval: {found['model']}", machine, quality=[found])


def _llama_quality(content: Content) -> dict[str, Any]:
    entries, base = [], content["against_float32"]["BF16"]["file_bytes"]
    for form, found in content["against_float32"].items():
        entries.append(
            {
                "model": content["model"],
                "system": f"llama.cpp {form}",
                "bits": round(16 * found["file_bytes"] / base, 3),
                "bytes": int(found["file_bytes"]),
                "perplexity": found["perplexity"],
                "perplexity_ratio": found["perplexity_ratio"],
                "mean_kl": found["mean_kl"],
                "p99_kl": found["kl_99"],
                "top_agreement": found["same_first_choice_percent"] / 100,
                "text": f"{content['text']}, scored by llama-perplexity",
            }
        )
    return _made(f"llama.cpp's formats: {content['model']}", content["machine"], quality=entries)


_Kind = tuple[Callable[[Content], bool], Callable[[Content], dict[str, Any]]]
_KINDS: tuple[_Kind, ...] = (
    (lambda c: c.get("benchmark") == "compare_cpu", _compare_cpu),
    (lambda c: c.get("benchmark") == "compare_hf", _compare_hf),
    (lambda c: c.get("benchmark") == "llama_quality", _llama_quality),
    (lambda c: {"rounds", "asked"} <= c.keys(), _compare_serving),
    (lambda c: {"model", "weights", "rows", "isa"} <= c.keys(), _octavo_bench),
    (lambda c: {"loads", "asked", "client"} <= c.keys(), _bench_serve),
    (lambda c: {"model", "divergence", "num_scored"} <= c.keys(), _octavo_eval),
    (lambda c: any(isinstance(v, dict) and "sources" in v for v in c.values()), _gpu),
)
