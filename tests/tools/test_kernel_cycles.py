"""The model of a multiprocessor: what it makes of loops whose cycles can be counted by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NONE = 7  # no counter


@pytest.fixture
def cycles(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("kernel_cycles", "kernel_resources"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("kernel_cycles")


def line(address: int, text: str, stall: int = 1, sets: int = NONE, waits: int = 0) -> str:
    """An instruction as cuobjdump prints it, with its control fields."""
    high = (stall | sets << 5 | NONE << 8 | waits << 11) << 41
    return (
        f"        /*{address:04x}*/                   {text} ;    /* 0x{0:016x} */\n"
        f"                                                      /* 0x{high:016x} */\n"
    )


def loop_of(*texts: tuple[str, int, int, int]) -> str:
    """A loop that waits for copies and then does these."""
    lines = [line(0, "MOV R1, R2"), line(16, "DEPBAR.LE SB0, 0x1")]
    lines += [line(32 + 16 * i, *text) for i, text in enumerate(texts)]
    return "".join(lines) + line(32 + 16 * len(texts), "@!P1 BRA 0x10", 5)


def of_loop(cycles: ModuleType, sass: str, warps: int, blocks: int = 1) -> float:
    code = cycles.one_pass(cycles.main_loop(cycles.parse(sass)), set(), set())
    result: float = cycles.Multiprocessor(code, warps, blocks).run(passes=20)
    return result


PRODUCT = ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 1, NONE, 0)


def test_what_an_instruction_says_is_read(cycles: ModuleType) -> None:
    sass = line(0x1A40, "@!P0 LDS.128 R8, [R2+0x200]", 3, 2, 0b100001)
    (one,) = cycles.parse(sass)
    assert (one.address, one.name, one.stall) == (0x1A40, "LDS", 3)
    assert (one.sets, one.frees, one.waits, one.wavefronts) == (2, NONE, 0b100001, 4)
    (jump,) = cycles.parse(line(0x20, "@!P1 BRA P0, 0x2ca0"))
    assert (jump.name, jump.jumps_to) == ("BRA", 0x2CA0)


@pytest.mark.parametrize(("warps", "busy"), [(4, 20 * 6.2), (8, 40 * 6.2)])
def test_products_keep_the_tensor_cores_busy(cycles: ModuleType, warps: int, busy: float) -> None:
    """Of a warp on each scheduler, or of two that take turns."""
    found = of_loop(cycles, loop_of(*[PRODUCT] * 20), warps)
    assert 0.98 * busy <= found <= 1.02 * busy + 20


def test_a_load_is_waited_for_where_its_result_is_used(cycles: ModuleType) -> None:
    load = ("LDS.128 R8, [R2]", 1, 3, 0)
    used, unused = [("FADD R1, R8, R8", 1, NONE, wait) for wait in (0b1000, 0)]
    late = of_loop(cycles, loop_of(load, used, PRODUCT), warps=4)
    soon = of_loop(cycles, loop_of(load, unused, PRODUCT), warps=4)
    assert cycles.SHARED - 2 <= late - soon <= cycles.SHARED + 2


def test_all_warps_share_one_path_to_shared_memory(cycles: ModuleType) -> None:
    """16 warps' loads of 512 bytes are 64 cycles, though each scheduler has only four of them."""
    loads = [("LDS.128 R8, [R2]", 1, 3, 0)] * 8
    sass = loop_of(*loads, PRODUCT, ("FADD R1, R8, R8", 1, NONE, 0b1000))
    assert of_loop(cycles, sass, warps=16) >= 0.98 * 8 * 64


def test_a_barrier_is_of_a_block(cycles: ModuleType) -> None:
    """Two blocks of four warps need not wait for each other; eight warps of one block must."""
    slow = [("FADD R1, R1, R1", 12, NONE, 0)] * 6
    sass = loop_of(("BAR.SYNC.DEFER_BLOCKING 0x0", 1, NONE, 0), *slow, PRODUCT)
    assert of_loop(cycles, sass, warps=4, blocks=2) <= of_loop(cycles, sass, warps=8)


def test_the_end_of_a_slice_is_skipped(cycles: ModuleType) -> None:
    """Much code behind the products, which one branch leaves out; others are named by --take."""
    lines = [
        line(0x10, "DEPBAR.LE SB0, 0x1"),
        line(0x20, "@P2 BRA 0x40"),
        line(0x30, "MUFU R1, R2"),
    ]
    lines += [line(0x40, PRODUCT[0]), line(0x50, "@!P0 BRA 0x200")]
    lines += [line(address, "FADD R1, R1, R1") for address in range(0x60, 0x200, 16)]
    sass = "".join(lines) + line(0x200, "@!P1 BRA 0x10")
    loop = cycles.main_loop(cycles.parse(sass))
    names = [each.name for each in cycles.one_pass(loop, set(), set())]
    assert names == ["DEPBAR", "BRA", "MUFU", "HMMA", "BRA", "BRA"]
    assert "MUFU" not in [each.name for each in cycles.one_pass(loop, {0x20}, set())]
    assert len(cycles.one_pass(loop, set(), {0x50})) == len(names) + 26
    with pytest.raises(SystemExit, match="HMMA"):
        cycles.main_loop(cycles.parse(sass.replace("HMMA", "IMAD")))
