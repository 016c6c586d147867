"""Compress models without torchrun, on 1, 2 and 4 ranks and on two nodes of one rank, and compare
the bytes.

    python scripts/ranks_equal.py --stories data/stories260k
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json scripts/results/ranks.json

The models are stories260k, a small Mixtral with its tokenizer and, with --gguf, the first six
blocks of that model without its head; all are calibrated on stories.txt, with corrected drift and
sensitivities. The ranks are processes on CPUs (gloo) with one thread each. Returns 1 where bytes
differ.
"""

import argparse
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COUNTS = (1, 2, 4)
"""Numbers of ranks on one node."""
BLOCKS = 6
"""Blocks of the model from --gguf."""
FEW = {
    "stories260k": "--samples 32 --sequence-length 128 --batch-size 2 --lmbda 1e-7",
    "mixtral": "--samples 32 --sequence-length 64 --batch-size 2 --lmbda 1e-7",
    "six blocks": "--samples 8 --sequence-length 128 --batch-size 1 --lmbda 1e-8 --keep-head",
}
"""Model -> its settings."""
SETTINGS = "--drift correct --sensitivity row --device cpu --quiet"


def environment() -> dict[str, str]:
    """Return the environment of processes with one thread, on this machine alone."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }


def started(arguments: Sequence[str], *torchrun: str) -> subprocess.Popen[str]:
    """Start the command line, under torchrun with these options if there are any."""
    launcher = ("-m", "torch.distributed.run", *torchrun) if torchrun else ()
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "cerwu_gpu", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(arguments: Sequence[str], *torchrun: Sequence[str]) -> float:
    """Run the command line under each of these torchruns at once, or without; return seconds."""
    begin = time.perf_counter()
    runs = [started(arguments, *options) for options in torchrun or ((),)]
    printed = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        sys.exit("\n".join(printed))
    return time.perf_counter() - begin


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def two_nodes() -> list[tuple[str, ...]]:
    """Return the options of two torchruns of one rank each that meet at a free port."""
    nodes = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    return [(*nodes, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "cerwu")] * 2


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compared(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Compress in every way; return the seconds and whether the bytes are equal, by way."""
    ways: dict[str, list[tuple[str, ...]]] = {"no torchrun": []}
    ways |= {
        f"{n} rank{'s' * (n > 1)}": [("--nproc-per-node", str(n), "--standalone")] for n in COUNTS
    }
    ways["2 nodes of 1 rank"] = two_nodes()
    expected: dict[str, str] = {}
    results = {}
    for way, torchrun in ways.items():
        output = folder / way.replace(" ", "-")
        seconds = finished([*arguments, "-o", str(output)], *torchrun)
        there = digests(output)
        expected = expected or there
        results[way] = {"seconds": round(seconds, 1), "equal": there == expected}
        print(f"  {way}: {seconds:.0f} s, equal bytes: {there == expected}", flush=True)
    return results


def make_mixtral(folder: Path, stories: Path) -> None:
    """Write a small random Mixtral with the tokenizer of stories260k."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)


def make_shorter(folder: Path, source: Path, blocks: int) -> None:
    """Write the first blocks of a model, float32, as a directory."""
    from cerwu_gpu.hf.models import load_model, require_tokenizer

    loaded = load_model(source)
    loaded.model.model.layers = loaded.model.model.layers[:blocks]
    loaded.model.config.num_hidden_layers = blocks
    if getattr(loaded.model.config, "layer_types", None):
        loaded.model.config.layer_types = loaded.model.config.layer_types[:blocks]
    loaded.model.save_pretrained(folder)
    require_tokenizer(loaded.tokenizer).save_pretrained(folder)


def made(name: str, folder: Path, given: argparse.Namespace) -> Path:
    """Return the directory of a model, made where it is none."""
    if name == "stories260k":
        return Path(given.stories)
    if name == "mixtral":
        make_mixtral(folder / name, given.stories)
        return folder / name
    make_shorter(folder / "shorter", given.gguf, BLOCKS)
    return folder / "shorter"


def main(arguments: list[str] | None = None) -> int:
    """Compare and print; return 1 where something is not as it must be."""
    sys.path[0] = str(ROOT)  # this folder's evaluate.py would shadow Hugging Face's package
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=Path, required=True, help="directory of stories260k")
    parser.add_argument("--gguf", type=Path, help="a .gguf file, such as SmolLM2's")
    parser.add_argument("--models", nargs="+", choices=list(FEW), help="default: all there are")
    parser.add_argument("--json", type=Path, help="file for the result; other models in it stay")
    given = parser.parse_args(arguments)
    names = given.models or [name for name in FEW if name != "six blocks" or given.gguf]
    bad = 0
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = made(name, folder, given)
            text = str(given.stories / "stories.txt")
            settings = [*FEW[name].split(), *SETTINGS.split()]
            command = ["compress", str(model), "--calibration", text, *settings]
            print(f"{name}: {' '.join(settings)}", flush=True)
            ways = compared(command, folder)
            bad += sum(not way["equal"] for way in ways.values())
            if given.json:
                recorded(given.json, name, {"settings": settings, "ways": ways})
    return int(bad > 0)


def recorded(path: Path, name: str, result: dict[str, Any]) -> None:
    """Write the result of a model beside those of others."""
    models = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    content = {"machine": machine, "models": {**models, name: result}}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
