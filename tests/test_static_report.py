"""The report on compiled kernels: its arithmetic by hand, its reading of machine code, and one whole report."""

import re

import pytest

import gsda_kernels as gk

pytest.importorskip("triton")
if gk.available_backends("cpu")["triton"] is None:
    pytest.skip("TRITON_INTERPRET is set: such a process cannot compile", allow_module_level=True)

from benchmarks.static_report import instructions, loops, main, occupancy

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   MOV R2, R3 ;
.L_x_2:
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R6.64] ;
        /*0030*/              @!P0 LDG.E R5, desc[UR4][R6.64] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3) ;
"""


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (255, 0, 8, 1),  # 255 registers are handed out as 256: 65536 of 65536
        (128, 0, 8, 2),
        (126, 33 * 1024, 8, 2),
        (32, 44 * 1024, 4, 5),  # by shared memory: 228 KB over 45
        (16, 0, 4, 16),  # by threads
        (16, 0, 1, 32),
    ],
)
def test_occupancy_by_hand(registers: int, shared: int, warps: int, expected: int) -> None:
    assert occupancy(registers, shared, warps) == expected


def test_innermost_loops_and_their_instructions() -> None:
    inner, idle = loops(SASS)
    assert instructions(inner) == {"LDGSTS.128": 1, "LDG.32": 1, "HGMMA": 1, "BRA": 1}
    assert instructions(idle) == {"BRA": 1}


def test_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shapes", "digits", "--kinds", "half", "--kernels", "weight_gradient_kernel"]) == 0
    text = capsys.readouterr().out
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| (?!kernel)", line)]
    names = ["weight_gradient 1", "weight_gradient 2", "weight_gradient 2, moves", "weight_gradient 1, moves"]
    assert [row[1].strip() for row in rows] == names
    assert all(int(row[6]) == 0 and int(row[7]) >= 1 for row in rows)
