"""What an installation holds: kernels/ is cerwu_gpu.kernels in it, and never a module `kernels`.

Built and installed from a temporary copy of the tree, without the network.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import cerwu_gpu

ROOT = Path(__file__).resolve().parents[1]
PROBE = "ANSWER = 42\n"
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "Makefile")


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Standard output of `command`, run in `cwd` with nothing but `path` in PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, with one more kernel: kernels/probe.py."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    for name in ("cerwu_gpu", "kernels", "docs", "scripts", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    (copy / "kernels" / "probe.py").write_text(PROBE, encoding="utf-8")
    return copy


def build(kind: str, checkout: Path, target: Path) -> Path:
    """The wheel, sdist or editable wheel of `checkout`, as any build front end asks for it."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}(r'{target}'))"
    return target / run(sys.executable, "-c", code, cwd=checkout).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["editable", "wheel"])
def python(
    request: pytest.FixtureRequest,
    checkout: Path,
    wheel: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The interpreter of a fresh environment that has cerwu_gpu and a stand-in for `kernels`.

    Everything else comes from the environment that runs the tests, later on the path.
    """
    home = tmp_path_factory.mktemp(request.param) / "environment"
    venv.create(home, with_pip=False)
    interpreter = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = Path(
        run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home)
    )
    source = checkout if request.param == "editable" else wheel
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
    editable = ["--editable"] if request.param == "editable" else []
    pip = [sys.executable, "-m", "pip", f"--python={interpreter}", "install"]
    os_path = f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    (packages / "zz_tests.pth").write_text(os_path, encoding="utf-8")
    run(*pip, *flags, *editable, source, cwd=home)
    stand_in = packages / "kernels"
    stand_in.mkdir()
    (stand_in / "__init__.py").write_text("STAND_IN = True\n", encoding="utf-8")
    return interpreter


def test_the_package_list_is_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    sources = [*(ROOT / "cerwu_gpu").rglob("*.py"), ROOT / "cerwu_gpu" / "kernels" / "any.py"]
    tree = {".".join(path.relative_to(ROOT).parent.parts) for path in sources}
    assert sorted(tree) == settings["tool"]["setuptools"]["packages"]


def test_the_wheel_holds_the_kernels_and_no_module_called_kernels(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for source in [*(ROOT / "kernels").glob("*.py"), Path("probe.py")]:
            stored = archive.read(f"cerwu_gpu/kernels/{source.name}").decode()
            expected = PROBE if source == Path("probe.py") else source.read_text(encoding="utf-8")
            assert stored == expected
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"cerwu_gpu", f"cerwu_gpu-{cerwu_gpu.__version__}.dist-info"}
    assert "cerwu_gpu/py.typed" in names
    assert "cerwu_gpu/kernels/__init__.py" not in names


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cerwu_gpu").rglob("*.py")}
    assert modules <= names


def test_the_wheel_holds_modules_the_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        others = {name for name in archive.namelist() if not name.endswith(".py")}
    about = f"cerwu_gpu-{cerwu_gpu.__version__}.dist-info"
    written = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")
    files = {f"{about}/{name}" for name in (*written, "licenses/LICENSE")}
    templates = ("page.html", "comparison.html", "drawings.html", "style.css")
    pages = {f"cerwu_gpu/report_page/{name}.jinja" for name in templates}
    assert others == {"cerwu_gpu/py.typed", *pages, *files}


def test_the_sdist_holds_what_the_build_and_the_tests_read(checkout: Path, tmp_path: Path) -> None:
    """The kernels where the build reads them, and every file of the tests, golden ones included."""
    with tarfile.open(build("sdist", checkout, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    golden = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests" / "golden").rglob("*.*")
        if path.parent.name != "__pycache__"
    }
    assert len(golden) > 50
    assert {*FILES, *golden, "kernels/probe.py", "docs/format.md", "scripts/demo.py"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_an_installation_has_the_kernels(python: Path, tmp_path: Path) -> None:
    code = "import cerwu_gpu.kernels.probe as probe; print(probe.ANSWER)"
    assert run(python, "-c", code, cwd=tmp_path) == "42"


@pytest.mark.parametrize("where", ["elsewhere", "in the checkout"])
def test_an_installation_does_not_shadow_a_package_called_kernels(
    python: Path, checkout: Path, tmp_path: Path, where: str
) -> None:
    """Neither by an editable install's path entry nor by the current directory."""
    cwd = checkout if where == "in the checkout" else tmp_path
    code = "import cerwu_gpu.kernels.probe, kernels; print(kernels.STAND_IN)"
    assert run(python, "-c", code, cwd=cwd) == "True"


def test_the_checkout_itself_does_not_shadow_a_package_called_kernels(
    checkout: Path, tmp_path: Path
) -> None:
    """`python -m pytest` and notebooks have the current directory first on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("STAND_IN = True\n", encoding="utf-8")
    code = "import cerwu_gpu.kernels.probe, kernels; print(kernels.STAND_IN)"
    assert run(sys.executable, "-c", code, cwd=checkout, path=tmp_path) == "True"


def test_transformers_can_be_imported_from_the_checkout() -> None:
    """It looks for Hugging Face's kernels while it is imported."""
    code = "from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.__name__)"
    assert run(sys.executable, "-c", code, cwd=ROOT) == "AutoModelForCausalLM"
