"""The decoder compiles for both targets, keeps everything in registers, and fills a processor."""

import pytest

from cerwu_gpu.kernels.ans import LANES, LOOKUP_BITS, Batch, Levels
from cerwu_gpu.spec import PRECISION, WORD_BITS
from tests.kernels.aot import Build, Resources, compile_all, report

POINTERS = {
    "p_programs": "*i64",
    "p_matrices": "*i64",
    "p_words": "*i32",
    "p_ends": "*i64",
    "p_lookup": "*i32",
    "p_slots": "*i64",
    "p_row_table": "*i32",
    "p_column_table": "*i32",
    "p_status": "*i32",
}
FUSED = {
    "p_levels": "*fp32",
    "p_alphabets": "*i64",
    "p_steps": "*fp32",
    "p_scales": "*fp32",
    "p_escape_count": "*i32",
    "p_places": "*i64",
}
SIZES = {
    "BL": LANES,
    "FIELDS": Batch.FIELDS,
    "ALPHABET_FIELDS": Levels.FIELDS,
    "LOOKUP": LOOKUP_BITS,
    "BITS": PRECISION,
    "WORD": WORD_BITS,
}


def decoder(out: str, fused: bool, escapes: bool) -> Build:
    return Build(
        "cerwu_gpu.kernels.ans",
        "decode_kernel",
        {**POINTERS, "p_out": f"*{out}", **(FUSED if fused else {})},
        {
            **SIZES,
            "FUSED": fused,
            "ESCAPES": escapes,
            **({} if fused else dict.fromkeys(FUSED)),
        },
        num_warps=1,
        label=out + (" escapes" if escapes else ""),
    )


BUILDS = [
    decoder("i32", fused=False, escapes=False),
    decoder("bf16", fused=True, escapes=False),
    *(decoder(out, fused=True, escapes=True) for out in ("bf16", "fp16", "fp32")),
]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> list[Resources]:
    found = compile_all(BUILDS)
    # Past the capture: CI keeps the table of what each build takes.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + report(found))
    return found


def test_nothing_spills(compiled: list[Resources]) -> None:
    assert len(compiled) == 2 * len(BUILDS)
    assert [each for each in compiled if each.spills] == []


def test_all_programs_of_a_processor_have_room_for_their_registers(
    compiled: list[Resources],
) -> None:
    """A processor takes 32 programs of one warp, and has 65536 registers."""
    assert max(each.registers for each in compiled) <= 65536 // (32 * 32)
    assert max(each.shared for each in compiled) == 0
