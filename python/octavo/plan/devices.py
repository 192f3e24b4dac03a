"""Devices to plan for: what their makers say of them, and how much of it programs reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

from octavo.bench.peak import WORDS, measure
from octavo.config import RuntimeOptions
from octavo.errors import InvalidArgumentError
from octavo.machine import available_memory, processor, threads_of_rank
from octavo.plan.memory import KERNELS_A_LAYER, KERNELS_OF_RANK

_MIB = 2**20


@dataclass(frozen=True)
class Device:
    """A device as the plan sees it.

    memory: bytes. bandwidth: bytes a second that programs read, at best. operations: bf16 or
    whole-number operations a second that matrix products and attention reach. step_overhead:
    seconds of each layer's dependent kernels, and of a step's others, beyond reading and computing.
    reserved: bytes for what no formula gives (the driver's context and code). is_gpu: activations
    are bf16, and reading and computing go on at the same time. assumptions: where these figures are
    from.
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    operations: float
    assumptions: tuple[str, ...]
    layer_overhead: float = 0.0
    step_overhead: float = 0.0
    reserved: int = 0
    is_gpu: bool = True

    def of_rank(self, ranks: int) -> Device:
        """What each of so many ranks has: a GPU of this kind, or its share of this processor."""
        if ranks == 1:
            return self
        if self.is_gpu:
            return replace(self, layer_overhead=_KERNEL_SECONDS * KERNELS_OF_RANK)
        bandwidth, operations = self.bandwidth / ranks, self.operations / ranks
        memory = self.memory // ranks
        return replace(self, memory=memory, bandwidth=bandwidth, operations=operations)


# Five dependent kernels a layer and two at the end. On an H100, octavo's bf16 step of Llama-3.2-1B
# took 1007 us where reading its weights takes 803 (docs/cuda.md): 2.5 us for each of 82 kernels.
_KERNEL_SECONDS = 2.5e-6
_RESERVED = 450 * _MIB
_PREFILL = 0.5
# Parts of the measured limits that octavo's decoding and prompts reach (docs/cpu.md): with AVX-512
# of the format's own arithmetic, with AMX, and with other instruction sets of float32's: weights in
# floating point, and in codes.
_CPU_DECODE, _CPU_PREFILL, _CPU_PREFILL_AMX = 0.9, 0.75, 0.3
_CPU_PREFILL_PLAIN, _CPU_PREFILL_PLAIN_CODES = 0.5, 0.7


def _gpu(
    name: str, title: str, mib: int, bandwidth: float, read: float, tflops: float, source: str
) -> Device:
    """bandwidth: bytes a second by the maker; read: the part of them that programs read."""
    return Device(
        name,
        title,
        mib * _MIB,
        bandwidth * read,
        tflops * 1e12 * _PREFILL,
        (
            f"memory is read at {bandwidth * read / 1e12:.2f} TB/s, {read:.0%} of {title}'s "
            f"{bandwidth / 1e12:.2f}: {source}",
            f"products and attention reach {_PREFILL:.0%} of {tflops:g} bf16 TFLOP/s (assumed)",
            "a kernel that waits for the one before it costs 2.5 us (measured on an H100), five a "
            "layer",
            "the driver's context and the kernels take 450 MiB, a recorded kernel 8 KiB (assumed)",
        ),
        _KERNEL_SECONDS * KERNELS_A_LAYER,
        _KERNEL_SECONDS * 2,
        _RESERVED,
    )


# Memory is what `nvidia-smi` shows; peak figures are those of NVIDIA's data sheets, without
# sparsity. Parts of the bandwidth: A100 40 GB and H100 as other programs have measured it.
GPUS = {
    device.name: device
    for device in (
        _gpu("a100-40", "A100 40 GB", 40960, 1.555e12, 0.89, 312, "measured by others"),
        _gpu("a100-80", "A100 80 GB", 81920, 2.039e12, 0.83, 312, "measured by others"),
        _gpu("h100", "H100 80 GB SXM", 81559, 3.35e12, 0.92, 989, "measured by octavo"),
        _gpu("h200", "H200 141 GB", 143771, 4.8e12, 0.88, 989, "assumed"),
        _gpu("l40s", "L40S 48 GB", 46068, 0.864e12, 0.9, 362, "assumed"),
        _gpu("a10", "A10 24 GB", 23028, 0.6e12, 0.85, 125, "assumed"),
        _gpu("rtx-4090", "RTX 4090 24 GB", 24564, 1.008e12, 0.92, 165, "measured by others"),
    )
}
NAMES = ("cpu", *GPUS)
# Older ones have no bf16, which the kernels need.
_TOO_OLD = {"v100": "7.0", "t4": "7.5", "p100": "6.0", "rtx-6000": "7.5"}


def find_gpu(name: str) -> Device:
    """The GPU of a name; InvalidArgumentError for one that octavo does not know or cannot use."""
    if name in _TOO_OLD:
        raise InvalidArgumentError(
            f"--gpu is {name!r}, whose compute capability is {_TOO_OLD[name]}; octavo's kernels "
            f"need 8.0 (bf16): expected one of {', '.join(NAMES)}"
        )
    if name not in GPUS:
        raise InvalidArgumentError(f"--gpu is {name!r}; expected one of {', '.join(NAMES)}")
    return GPUS[name]


def this_processor(options: RuntimeOptions, reserved: int, ranks: int = 1) -> Device:
    """The processor that runs this, measured with the threads of all ranks.

    reserved: bytes that Python and its libraries take in each process.
    """
    from octavo import _native

    info = _native.build_info()
    threads = ranks * threads_of_rank(options.num_threads, ranks)
    isa = str(info["isa"]) if options.isa == "auto" else options.isa
    peak = measure(options, threads)
    prefill, flops, arithmetic = _CPU_PREFILL, peak.flops, peak.arithmetic
    if isa == "amx":
        prefill = _CPU_PREFILL_AMX
    elif not isa.startswith("avx512"):
        prefill = _CPU_PREFILL_PLAIN_CODES if options.formats else _CPU_PREFILL_PLAIN
        flops, arithmetic = peak.float32_flops, WORDS["f32"]
    return Device(
        "cpu",
        processor(),
        available_memory() + reserved,
        peak.bandwidth * _CPU_DECODE,
        flops * prefill,
        (
            f"memory is read at {peak.bandwidth * _CPU_DECODE / 1e9:.1f} GB/s, {_CPU_DECODE:.0%} "
            f"of what {threads} threads read here now (measured)",
            f"prompts reach {prefill:.0%} of {flops / 1e12:.2f} TFLOP/s ({arithmetic}, measured)",
            "reading and computing hide each other in part: the root of the sum of their squares",
        ),
        reserved=reserved,
        is_gpu=False,
    )
