"""The column-block kernels compile for both targets and keep everything in registers."""

import pytest

from cerwu_gpu.kernels import obs
from cerwu_gpu.kernels import trellis as kernel
from cerwu_gpu.kernels import trellis_wide as wide
from cerwu_gpu.spec import TRELLIS_REGISTER
from tests.kernels.aot import Build, Resources, compile_all, report

POINTERS = {
    "p_x": "*fp32",
    "p_factor": "*fp32",
    "p_rates": "*fp32",
    "p_row_class": "*i64",
    "p_column_class": "*i64",
    "p_lmbda": "*fp32",
    "p_importance": "*fp32",
    "p_curvature": "*fp32",
}
OUT = {"p_symbols": "*i32", "p_error": "*fp32"}
SIZES = dict.fromkeys(
    (
        *("rows", "columns", "stride_x", "stride_factor", "stride_problem", "stride_rates"),
        *("lowest", "size"),
    ),
    "i32",
)
SCALAR = {**POINTERS, **OUT, "p_levels": "*fp32", **SIZES}
PATHS = {"p_path_error": "*fp32", "p_path_symbol": "*i32", "p_origin": "*i32"}
TRELLIS = {**POINTERS, **PATHS, "p_start": "*i64", "p_best": "*i64", "commit": "i32", **SIZES}
TRACE = {
    **PATHS,
    **OUT,
    "p_state": "*i64",
    **dict.fromkeys(("rows", "columns", "commit"), "i32"),
}
ALIGNED = ("columns", "stride_x", "stride_factor")


def scalar(label: str, aligned: bool, exhaustive: bool, levels: bool, escapes: bool) -> Build:
    flags = {"EXHAUSTIVE": exhaustive, "LEVELS": levels, "ESCAPES": escapes}
    return Build(
        "cerwu_gpu.kernels.obs",
        "quantize_block_kernel",
        SCALAR,
        {"BR": obs.BLOCK_ROWS, "BC": obs.BLOCK_COLUMNS, "BG": obs.BLOCK_LEVELS, **flags},
        divisible=ALIGNED if aligned else (),
        num_warps=obs.WARPS,
        num_stages=obs.STAGES,
        maxnreg=obs.REGISTERS,
        label=label,
    )


def trellis(states: int) -> Build:
    return Build(
        "cerwu_gpu.kernels.trellis",
        "quantize_block_trellis_kernel",
        TRELLIS,
        {"STATES": states, "BR": kernel.BLOCK_ROWS, "BC": kernel.BLOCK_COLUMNS},
        divisible=ALIGNED,
        num_warps=kernel.WARPS,
        num_stages=kernel.STAGES,
        maxnreg=kernel.REGISTERS,
        label=f"{states} states",
    )


def trellis_wide(states: int) -> Build:
    feedback, enter = TRELLIS_REGISTER[states]
    rows = wide.SURVIVORS // states
    sizes = {"STATES": states, "BR": rows, "BC": kernel.BLOCK_COLUMNS}
    return Build(
        "cerwu_gpu.kernels.trellis_wide",
        "quantize_block_trellis_wide_kernel",
        TRELLIS,
        {**sizes, "FEEDBACK": feedback, "ENTER": enter},
        divisible=ALIGNED,
        num_warps=wide.WARPS,
        num_stages=wide.STAGES,
        label=f"{states} states",
    )


def trace_back(states: int) -> Build:
    return Build(
        "cerwu_gpu.kernels.trellis",
        "trace_back_kernel",
        TRACE,
        {"STATES": states, "BR": kernel.BLOCK_ROWS, "BC": kernel.BLOCK_COLUMNS},
        num_warps=kernel.WARPS,
        label=f"{states} states",
    )


BUILDS = [
    scalar("near", aligned=True, exhaustive=False, levels=False, escapes=True),
    scalar("near, odd strides", aligned=False, exhaustive=False, levels=False, escapes=False),
    scalar("full", aligned=True, exhaustive=True, levels=False, escapes=False),
    scalar("list, odd strides", aligned=False, exhaustive=True, levels=True, escapes=False),
    trellis(4),
    trellis(8),
    trellis_wide(16),
    trellis_wide(32),
    trace_back(8),
    trace_back(32),
]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> list[Resources]:
    found = compile_all(BUILDS)
    # Past the capture: CI keeps the table of what each build takes.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + report(found))
    return found


@pytest.mark.slow
def test_every_build_compiles_for_both_targets(compiled):
    built = {(each.kernel, each.label, each.capability) for each in compiled}
    assert len(built) == 2 * len(BUILDS)


@pytest.mark.slow
def test_nothing_spills_to_local_memory(compiled):
    assert [each for each in compiled if each.spills] == []


@pytest.mark.slow
def test_two_programs_fit_on_a_processor(compiled):
    # 65536 registers; 4096 rows are 256 programs, which 132 processors then take at once.
    for each in compiled:
        assert 2 * each.registers * 32 * each.num_warps <= 65536
        assert 2 * each.shared <= 160 * 1024
