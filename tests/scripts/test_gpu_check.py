"""scripts/gpu_check.sh works without a GPU on tiny sizes, and keeps what it has when time is up."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    # The script puts the checkout in place of its own folder, the first entry.
    patch.setattr(sys, "path", [str(ROOT), *sys.path])
    check = importlib.import_module("scripts.gpu_check")

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@without_gpu
def test_the_call_writes_device_versions_and_rows(tmp_path):
    target = tmp_path / "gpu.json"
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--tiny", "--only", "search"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(
        [*command, "--json", str(target)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(target.read_text())
    assert results["device"] == "none: Triton's interpreter"
    assert results["versions"]["torch"] == torch.__version__
    step = results["steps"]["search"]
    assert step["state"] == "done"
    assert step["rows"] == [{"section": "passes", "what": "as defined"}]


@without_gpu
@pytest.mark.parametrize("name", ["experts", "resident", "model"])
def test_each_step_runs_on_tiny_sizes(name, monkeypatch):
    if name == "experts":
        monkeypatch.setenv("CERWU_GPU_BACKEND", "triton")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = list(check.STEPS[name].rows(True))
    finally:
        torch.set_num_threads(threads)
    assert rows
    assert all(row["section"] == name for row in rows)
    json.dumps(rows, allow_nan=False)


def test_the_steps_fit_into_nine_minutes_of_which_the_worthiest_is_first():
    first, *_, last = check.STEPS
    assert (first, last) == ("tests", "model")
    assert check.LIMIT == 540
    # The last step gets what the limits of the others leave it, however long they take.
    assert sum(step.seconds for step in list(check.STEPS.values())[:-1]) < check.LIMIT - 60


def test_every_file_with_a_test_for_a_gpu_is_run():
    files = check.gpu_tests()
    assert files[0] == "tests/kernels"
    assert "tests/test_backend.py" in files and "tests/compression/test_run.py" in files
    assert all((ROOT / file).exists() for file in files)


def test_a_step_that_takes_too_long_is_stopped_and_the_next_ones_still_run(tmp_path, monkeypatch):
    target = tmp_path / "gpu.json"
    states, seen = iter(["done", "failed", "out of time"]), []

    def run_step(name, tiny, seconds):
        # What came before is on the disk while a step runs.
        seen.append(json.loads(target.read_text())["steps"] if target.exists() else {})
        return {"state": next(states), "seconds": 1.0, "rows": [{"section": name}]}

    monkeypatch.setattr(check, "run_step", run_step)
    steps = ["search", "decoder", "model"]
    assert check.main(["--tiny", "--only", *steps, "--json", str(target)]) == 1
    kept = json.loads(target.read_text())["steps"]
    assert [kept[name]["state"] for name in steps] == ["done", "failed", "out of time"]
    assert seen[2]["decoder"]["rows"] == [{"section": "decoder"}]
    assert seen[1]["model"] == {"state": "not begun"}
    assert not target.with_suffix(".part").exists()


def test_no_step_begins_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "run_step", None)
    target = tmp_path / "gpu.json"
    assert check.main(["--tiny", "--seconds", "0", "--only", "search", "--json", str(target)]) == 1
    assert json.loads(target.read_text())["steps"] == {"search": {"state": "not begun"}}


def test_a_process_that_is_stopped_leaves_its_rows(monkeypatch, tmp_path):
    program = tmp_path / "step.py"
    program.write_text(
        'import sys, time\nprint(\'{"section": "a"}\', flush=True)\n'
        "sys.stdout.write('{\"section\": '); sys.stdout.flush()\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(check, "__file__", str(program))
    result = check.run_step("search", True, 2.0)
    assert result["state"] == "out of time"
    assert result["rows"] == [{"section": "a"}]
    assert result["seconds"] < 30


@without_gpu
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    target = tmp_path / "gpu.json"
    assert check.main(["--json", str(target)]) == 2
    assert capsys.readouterr().err == "gpu_check: no CUDA device here: use --tiny, or a GPU.\n"
    assert not target.exists()
