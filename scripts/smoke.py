"""Install a wheel into a fresh virtual environment and try the first steps of a new user.

    python scripts/smoke.py dist/cerwu_gpu-*.whl [--alone]

Its dependencies come from the environment that runs this script or, with --alone, from the package
index (which downloads torch). Nothing of a checkout is on the path. Each step is printed with its
seconds; the first one that fails ends the script with what it said and exit code 1.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from time import perf_counter

MODEL = """
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

text = "The harbour lies behind a low hill. In the morning the boats come back. " * 40
Path("my-text.txt").write_text(text, encoding="utf-8")
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<s>"])
tokenizer.train_from_iterator([text], trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained("my-model")
sizes = dict(vocab_size=280, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained("my-model")
"""
LOADING = """
import sys
from pathlib import Path

import cerwu_gpu
import torch
from transformers import AutoModelForCausalLM

assert Path(cerwu_gpu.__file__).is_relative_to(sys.prefix), cerwu_gpu.__file__
tokens = torch.arange(32)[None]
ways = {
    "from_pretrained": AutoModelForCausalLM.from_pretrained("small"),
    "load_compressed": cerwu_gpu.load_compressed("small"),
    "resident": cerwu_gpu.load_compressed("small", resident="compressed"),
    "decompress": AutoModelForCausalLM.from_pretrained("plain"),
}
logits = {way: model(tokens).logits for way, model in ways.items()}
for way, output in logits.items():
    assert torch.equal(output, logits["load_compressed"]), way
"""
FEW = ("--samples", "4", "--sequence-length", "32", "--quiet")


def environment(folder: Path, wheel: Path, *, alone: bool) -> Path:
    """Create an environment with the wheel and return the folder of its programs."""
    venv.create(folder, with_pip=alone)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    if alone:
        run("install", python, "-m", "pip", "install", "--quiet", wheel, cwd=folder)
        return programs
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run("create", python, "-c", purelib, cwd=folder).strip())
    paths = f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    (packages / "zz_dependencies.pth").write_text(paths, encoding="utf-8")  # last on the path
    pip = (sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet")
    run("install", *pip, "--no-deps", "--no-index", wheel, cwd=folder)
    return programs


def run(step: str, *command: str | Path, cwd: Path) -> str:
    """Run a step, print its stderr, and return its standard output."""
    begin = perf_counter()
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean["HF_HUB_OFFLINE"] = "1"  # the steps need no network, so a look at the Hub is a defect
    process = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True
    )
    print(f"{perf_counter() - begin:6.1f} s  {step}", flush=True)
    for line in process.stderr.splitlines():
        print(f"          {line}")
    if process.returncode != 0:
        sys.exit(f"smoke: {step} ended with {process.returncode}\n{process.stdout}")
    return process.stdout


def tried(programs: Path, folder: Path) -> None:
    """Run the steps of README and quickstart."""
    program, python = programs / "cerwu-gpu", programs / "python"
    version = run("--version", program, "--version", cwd=folder)
    assert version == run("python -m", python, "-m", "cerwu_gpu", "--version", cwd=folder), version
    assert "--install-completion" in run("--help", program, "--help", cwd=folder)
    run("make a model", python, "-c", MODEL, cwd=folder)
    options = ("my-model", "-o", "small", "--calibration", "my-text.txt", *FEW)
    run("compress", program, "compress", *options, cwd=folder)
    run("info", program, "info", "small", cwd=folder)
    run("verify", program, "verify", "small", cwd=folder)
    run("decompress", program, "decompress", "small", "-o", "plain", cwd=folder)
    windows = ("--text", "my-text.txt", "--context-length", "64", "--quiet")
    text = run("eval", program, "eval", "small", *windows, "--against", "my-model", cwd=folder)
    assert "perplexity" in text, text
    run("load", python, "-c", LOADING, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--alone", action="store_true", help="install the dependencies, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "environment"
        programs = environment(home, arguments.wheel.resolve(), alone=arguments.alone)
        work = Path(folder) / "work"
        work.mkdir()
        tried(programs, work)
    print(f"{arguments.wheel.name}: all steps passed")


if __name__ == "__main__":
    main()
