"""The Hub: what goes up, what comes down, and what is left of it without a network."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cerwu_gpu import load_compressed
from cerwu_gpu.cli import main
from tests.configs import compress_flat, configured
from tests.hf.toys import toy, toy_tokens
from tests.serving.hub_server import Hub, running_hub

LOAD = """
import sys, torch
from cerwu_gpu import load_compressed
model = load_compressed("user/small")
torch.save(model.state_dict(), sys.argv[1])
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A compressed toy, with a hidden file that is nobody's business."""
    config = configured(lmbda=1e-5)
    compress_flat(toy("llama"), tmp_path / "small", batches=[toy_tokens()], config=config)
    (tmp_path / "small" / ".note").write_text("mine", encoding="utf-8")
    return tmp_path / "small"


def run(hub: Hub, home: Path, *command: str, **environment: str) -> Any:
    """Run Python in a process of its own, in which the Hub is the server."""
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_toy"}
    settings = {**os.environ, **offline, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, *command], env={**settings, **environment}, capture_output=True, text=True
    )


def test_a_pushed_directory_loads_by_its_name_and_then_offline(
    hub: Hub, small: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    pushed = run(hub, home, "-m", "cerwu_gpu", "push", str(small), "user/small")
    assert pushed.returncode == 0, pushed.stderr
    assert (
        "no model card" in pushed.stdout and f"sent: {hub.url}/user/small/commit/" in pushed.stdout
    )
    sent = hub.repositories["user/small"]
    assert sent == {
        file.name: file.read_bytes() for file in small.iterdir() if file.name != ".note"
    }
    loaded = run(hub, home, "-c", LOAD, str(tmp_path / "online.pt"))
    assert loaded.returncode == 0, loaded.stderr
    hub.requests.clear()
    loaded = run(hub, home, "-c", LOAD, str(tmp_path / "offline.pt"), HF_HUB_OFFLINE="1")
    assert loaded.returncode == 0, loaded.stderr
    assert hub.requests == []
    expected = load_compressed(small).state_dict()
    for name in ("online.pt", "offline.pt"):
        state = torch.load(tmp_path / name)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_source_comes_with_the_folders_of_its_model_and_no_others(
    hub: Hub, tmp_path: Path
) -> None:
    folders = ("additional_chat_templates/rag.jinja", "1_Pooling/config.json")
    others = ("onnx/model.onnx", "onnx/config.json", "runs/events.json", "training_args.bin")
    files = ("config.json", "model.safetensors", "modules.json", "tokenizer.json")
    hub.repositories["user/dense"] = {name: b"{}" for name in (*files, *folders, *others)}
    home, program = tmp_path / "home", "from cerwu_gpu.hf.models import local_directory as local"
    program += "; print(local('user/dense'))"
    done = run(hub, home, "-c", program)
    assert done.returncode == 0, done.stderr
    snapshot = Path(done.stdout.splitlines()[-1])
    fetched = (file for file in snapshot.rglob("*") if file.is_file())
    assert {file.relative_to(snapshot).as_posix() for file in fetched} == {*files, *folders}


def test_a_dry_run_lists_what_would_go_up(hub: Hub, small: Path, tmp_path: Path) -> None:
    shown = run(hub, tmp_path, "-m", "cerwu_gpu", "push", str(small), "user/small", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    size = (small / "model.safetensors").stat().st_size
    assert f"{size:,}" in shown.stdout and "nothing was sent" in shown.stdout
    assert ".note" not in shown.stdout
    assert hub.requests == []


def test_what_the_hub_refuses_is_one_sentence(hub: Hub, small: Path, tmp_path: Path) -> None:
    hub.refusing = 403
    refused = run(hub, tmp_path, "-m", "cerwu_gpu", "push", str(small), "user/small")
    assert refused.returncode == 2
    assert "cannot be sent to user/small" in refused.stderr and "hf auth login" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_damaged_directory_is_not_sent(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = small / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(SystemExit) as exit_code:
        main(["push", str(small), "user/small", "--dry-run"])
    assert exit_code.value.code == 2
    assert "bytes have changed" in capsys.readouterr().err
