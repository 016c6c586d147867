"""Compile kernels ahead of time, without a GPU, and read what they will occupy on one.

    from tests.kernels.aot import Build, compile_all, report

    build = Build("cerwu_gpu.kernels.obs", "quantize_block_kernel",
                  {"p_x": "*fp32", "rows": "i32"}, {"BR": 16}, num_warps=1)
    found = compile_all([build])        # for sm_80 and sm_90, in one subprocess
    print(report(found))
    assert all(not each.spills for each in found)

A subprocess because the tests run under Triton's interpreter, where nothing is compiled: this file
is also the program that the subprocess runs.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90)
"""A100 and H100 / H200."""


@dataclass(frozen=True)
class Build:
    """One kernel with everything that a launch fixes at compile time.

    Attributes:
        module, kernel: where the jitted function is.
        signature: Triton's type of every argument that is no constexpr: "*fp32", "i64", ...
            Pointers are taken to be aligned to 16 bytes, as torch allocates them.
        constants: the value of every constexpr argument (what JSON can carry).
        divisible: integer arguments that are multiples of 16 in the launch meant here.
        num_warps, num_stages: as in the launch.
        maxnreg: registers that a thread may have, where the launch says so.
        label: tells builds of one kernel apart in the report.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    label: str = ""


@dataclass(frozen=True)
class Resources:
    """What one build occupies, from the resource section of its cubin.

    Attributes:
        registers: per thread.
        shared: bytes per program, static and dynamic.
        stack, local: bytes per thread in local memory: spilled registers and indexed arrays.
        instructions: length of the program in SASS.
        local_accesses: loads and stores of local memory (LDL, STL) among them.
        access_widths: how wide its global loads and stores are, as {bits: count}.
        barriers: BAR instructions.
    """

    kernel: str
    label: str
    capability: int
    num_warps: int
    registers: int
    shared: int
    stack: int
    local: int
    instructions: int
    local_accesses: int
    barriers: int
    access_widths: dict[str, int] = field(default_factory=dict)

    @property
    def spills(self) -> bool:
        """Whether a thread has anything in local memory."""
        return bool(self.stack or self.local or self.local_accesses)


def compile_all(
    builds: Iterable[Build], capabilities: Iterable[int] = CAPABILITIES, keep: Path | None = None
) -> list[Resources]:
    """Compile every build for every target in one subprocess without the interpreter.

    Args:
        builds: what to compile.
        capabilities: compute capabilities, 80 for sm_80.
        keep: a folder that receives the ttgir, ptx, cubin and sass of every build.

    Raises:
        RuntimeError: a kernel does not compile; the message holds what the compiler said.
    """
    request = {
        "builds": [asdict(build) for build in builds],
        "capabilities": list(capabilities),
        "keep": str(keep) if keep else None,
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"a kernel did not compile:\n{done.stderr[-6000:]}")
    return [Resources(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def report(found: Iterable[Resources]) -> str:
    """A table of what was found, one line for each build and target."""
    heads = ("target", "warps", "regs", "shared", "stack", "local", "barriers", "sass")
    lines = [f"{'kernel':<46}" + " ".join(f"{head:>8}" for head in heads)]
    for each in found:
        name = f"{each.kernel} {each.label}".strip()
        numbers = (
            *(f"sm_{each.capability}", each.num_warps, each.registers, each.shared),
            *(each.stack, each.local, each.barriers, each.instructions),
        )
        lines.append(f"{name:<46}" + " ".join(f"{number:>8}" for number in numbers))
    return "\n".join(lines)


def _compile(build: Build, capability: int, keep: str | None) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(build.module), build.kernel)
    names: list[str] = kernel.arg_names
    missing = [n for n in names if n not in build.signature and n not in build.constants]
    if missing:
        raise ValueError(f"{build.kernel}: give types or values for {', '.join(missing)}.")
    signature = {n: build.signature.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): value for n, value in build.constants.items()}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in build.divisible
    }
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    if build.maxnreg:
        options["maxnreg"] = build.maxnreg
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    folder = Path(keep) if keep else Path(tempfile.mkdtemp())
    stem = f"{build.kernel}-{build.label}-sm_{capability}".replace(" ", "_")
    cubin = folder / f"{stem}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    sass = _tool("nvdisasm", "--print-code", str(cubin))
    usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    if keep:
        (folder / f"{stem}.sass").write_text(sass)
        (folder / f"{stem}.ptx").write_text(compiled.asm["ptx"])
        (folder / f"{stem}.ttgir").write_text(compiled.asm["ttgir"])
    else:
        cubin.unlink()
        folder.rmdir()
    found = {name: int(value) for name, value in re.findall(r"(\w+(?:\[0\])?):(\d+)", usage)}
    # nvdisasm prints one instruction a line: /*0010*/ [@P0] OPCODE.MODIFIERS ...;
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", sass, re.M)
    widths: dict[str, int] = {}
    for opcode in opcodes:
        if opcode.startswith(("LDG", "STG")):
            wide = re.search(r"\.(U?8|S8|U?16|64|128)\b", opcode)
            width = wide.group(1).strip("US") if wide else "32"
            widths[width] = widths.get(width, 0) + 1
    return Resources(
        kernel=build.kernel,
        label=build.label,
        capability=capability,
        num_warps=build.num_warps,
        registers=found["REG"],
        # SHARED is the static part; Triton asks for all of its shared memory at launch.
        shared=found["SHARED"] + int(compiled.metadata.shared),
        stack=found["STACK"],
        local=found["LOCAL"],
        instructions=len([opcode for opcode in opcodes if opcode != "NOP"]),
        local_accesses=len([o for o in opcodes if o.startswith(("LDL", "STL"))]),
        barriers=len([o for o in opcodes if o.startswith("BAR")]),
        access_widths=widths,
    )


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA tools that come with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    results = [
        asdict(_compile(Build(**build), capability, asked["keep"]))
        for build in asked["builds"]
        for capability in asked["capabilities"]
    ]
    print(json.dumps(results))
