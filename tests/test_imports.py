"""The shape of the code, read from its imports: one direction, one home for transformers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "cerwu_gpu").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))

ORDER = (
    {"cli"},
    {"api", "vllm"},
    {"serving"},
    {"hf"},
    {"checkpoint"},
    {"sweep"},
    {"models"},
    {"calibration"},
    {"compression"},
    {"baselines", "container"},
    {"quantize"},
    {"coding"},
    {"backend"},
    {"compiled", "kernels", "reference"},
    {
        "block_problem",
        "coded",
        "config",
        "device",
        "efforts",
        "errors",
        "files",
        "layout",
        "memory",
        "progress",
        "quantities",
        "ranks",
        "report",
        "report_page",
        "spec",
        "steps",
        "threads",
    },
)
"""Each part may import from the parts below it and from itself, a leaf from the other leaves, too.

`quantize` stands above `coding` because the search counts bits with the coder's own tables."""
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
LEAVES = ORDER[-1]


def name_of(path: Path) -> str:
    """The module's full name: kernels/obs.py is cerwu_gpu.kernels.obs."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("cerwu_gpu", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[str]:
    """Every module, or name in a module, that `source` imports anywhere, with its dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str | None:
    """hf for cerwu_gpu.hf.text; None for the package itself, its version and others' modules."""
    package, _, rest = module.partition(".")
    part = rest.partition(".")[0]
    return part if package == "cerwu_gpu" and part not in ("", "__version__") else None


def wrong_direction(importer: str, imported: str) -> bool:
    """Whether part `importer` must not import from part `imported`."""
    if importer == imported or (importer in LEAVES and imported in LEAVES):
        return False
    return LEVEL[imported] <= LEVEL[importer]


IDS = [path.relative_to(ROOT).as_posix() for path in SOURCES]
each_file = pytest.mark.parametrize("path", SOURCES, ids=IDS)


def test_the_rule_itself_knows_wrong_from_right() -> None:
    assert wrong_direction("container", "hf")
    assert wrong_direction("coding", "quantize")
    assert wrong_direction("config", "reference")
    assert not wrong_direction("hf", "errors")
    assert not wrong_direction("config", "errors")
    assert not wrong_direction("quantize", "coding")
    assert list(imports("import a.b\nfrom c import d\ndef f():\n    from . import e")) == [
        "a.b",
        "c.d",
        "..e",
    ]


@each_file
def test_imports_go_one_way(path: Path) -> None:
    importer = part_of(name_of(path))
    if importer in (None, "__main__"):
        return  # the package's own names stand above everything
    assert importer in LEVEL, f"{importer} has no place in the order of imports: give it one"
    for module in imports(path.read_text(encoding="utf-8")):
        imported = part_of(module)
        if imported is not None:
            assert imported in LEVEL, f"{module} is imported by its own name, not the package's"
            assert not wrong_direction(importer, imported), f"{importer} imports {module}"


@each_file
def test_imports_are_absolute(path: Path) -> None:
    relative = [name for name in imports(path.read_text(encoding="utf-8")) if name[0] == "."]
    assert relative == []


@each_file
def test_only_the_upper_parts_know_transformers(path: Path) -> None:
    if part_of(name_of(path)) not in ("hf", "checkpoint", "serving", "api"):
        roots = {name.partition(".")[0] for name in imports(path.read_text(encoding="utf-8"))}
        assert not roots & {"transformers", "tokenizers", "datasets", "gguf"}


def module_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports when it is imported itself."""
    modules = {name_of(source) for source in SOURCES}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted: set[str] = set()
    for node in tree.body:  # what functions and TYPE_CHECKING import is read later, or never
        names = imports(ast.unparse(node)) if isinstance(node, ast.Import | ast.ImportFrom) else ()
        for name in names:
            wanted.add(name if name in modules else name.rpartition(".")[0])
    return (wanted & modules) - {name_of(path), "cerwu_gpu"}


def test_no_imports_go_round_in_a_circle() -> None:
    graph = {name_of(path): module_imports(path) for path in SOURCES}
    assert graph["cerwu_gpu.compression.run"] >= {"cerwu_gpu.compression.adapter"}
    while graph:
        leaves = {name for name, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"a circle among {', '.join(sorted(graph))}"
        graph = {name: targets for name, targets in graph.items() if name not in leaves}


def test_nothing_imports_a_bare_kernels() -> None:
    """transformers imports a Hugging Face package of that name."""
    sources = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    for path in sources:
        for name in imports(path.read_text(encoding="utf-8")):
            assert name.partition(".")[0] != "kernels", path


def test_kernels_is_a_link_and_never_a_package_of_its_own() -> None:
    link = ROOT / "cerwu_gpu" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("..") / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
