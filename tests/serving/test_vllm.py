"""vLLM for real, on the CPU: the tokens are those of the decompressed directory.

`make test-vllm` installs vLLM into an environment of its own and runs these.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from cerwu_gpu import decompress
from tests.configs import compress_flat, configured
from tests.hf.toys import CONFIGS, toy_tokens

pytest.importorskip("vllm.entrypoints", reason="vLLM is not installed: make test-vllm")

GENERATE = Path(__file__).parent / "generate.py"
COMPRESSED = {"model_loader_extra_config": {"resident": "compressed"}}
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
}
"""Sizes that vLLM's attention on the CPU takes."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 32}),
}


def toy_for_vllm(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of this family in sizes for vLLM."""
    import torch

    config = CONFIGS[family]()
    for name, value in {**SIZES, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with "small" and "dense", by model."""
    folders = {}
    for name, (family, changes) in MODELS.items():
        folder = folders[name] = tmp_path_factory.mktemp("vllm") / "toy"
        config = configured(lmbda=1e-6)
        model = toy_for_vllm(family, **changes)
        compress_flat(
            model, folder / "small", batches=[toy_tokens()], config=config, progress=False
        )
        decompress(folder / "small", folder / "dense")
    return folders


def generated(folder: Path, jobs: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Continuations of generate.py, by job and prompt."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [
        sys.executable,
        str(GENERATE),
        str(folder / "jobs.json"),
        str(folder / "results.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results: list[list[list[int]]] = json.loads((folder / "results.json").read_text("utf-8"))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_dense_model(name: str, toys: dict[str, Path]) -> None:
    small, dense = str(toys[name] / "small"), str(toys[name] / "dense")
    forms = [{"model": dense}, {"model": small}, {"model": small, **COMPRESSED}]
    expected, loaded, resident = generated(toys[name], forms)
    assert len({tuple(tokens) for tokens in expected}) > 1  # the prompts matter
    assert loaded == expected
    assert resident == expected


@pytest.mark.slow
def test_tensor_parallel_ranks_take_their_shards(toys: dict[str, Path]) -> None:
    folder = toys["llama, untied"]
    small = {"model": str(folder / "small"), "tensor_parallel_size": 2}
    jobs = [{"model": str(folder / "dense")}, small, {**small, **COMPRESSED}]
    expected, loaded, resident = generated(folder, jobs)
    assert loaded == expected
    assert resident == expected


@pytest.fixture(scope="module")
def server(toys: dict[str, Path]) -> Iterator[str]:
    """The address of `vllm serve small`."""
    port = "18431"
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    options = ["--skip-tokenizer-init", "--max-model-len", "64", "--enforce-eager"]
    command += [str(toys["qwen3"] / "small"), "--port", port, "--dtype", "float32", *options]
    with subprocess.Popen(command, env=environment) as process:
        try:
            for _ in range(300):
                assert process.poll() is None, "vllm serve ended"
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
def test_a_server_answers(server: str, toys: dict[str, Path]) -> None:
    model = str(toys["qwen3"] / "small")
    asked = {"model": model, "prompt": [3, 1, 5, 2], "max_tokens": 4, "temperature": 0}
    request = Request(
        f"{server}/v1/completions",
        json.dumps({**asked, "detokenize": False, "return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    answer = json.loads(urlopen(request, timeout=60).read())
    assert answer["usage"]["completion_tokens"] >= 1
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]


def test_other_models_stay_with_vllm() -> None:
    """A resident form is refused for a directory that is not compressed; else vLLM's own loader."""
    code = """
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
loader = get_model_loader(LoadConfig())
print(type(loader).__name__)
class Dense:
    quantization, model = None, "some"
class Settings:
    class device_config:
        device = "cpu"
try:
    get_model_loader(LoadConfig(model_loader_extra_config={"resident": "compressed"})).load_model(
        Settings, Dense)
except ValueError as error:
    print(error)
try:
    get_model_loader(LoadConfig(model_loader_extra_config={"resident": "both"}))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-3:] == [
        "CerwuLoader",
        "some is not compressed: drop resident.",
        "resident is 'both': use dense or compressed.",
    ]
    assert "already registered" not in done.stdout + done.stderr
