"""Peak anonymous memory of compressing random Llamas that differ in their number of layers.

Each model is made and compressed from disk in a process of its own, which looks at its `RssAnon`
(Linux) a hundred times a second. The result goes to scripts/results/streaming_memory.json:

    python scripts/streaming_memory.py --json scripts/results/streaming_memory.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Event, Thread
from typing import Any

MEGABYTE = 1_000_000
SHARE, ROOM = 1.3, 400
"""Bound of the peak after the imports: so many times the bytes of a block, its Hessians and the
activations, and so many megabytes beside them."""
INTERVAL = 0.01
"""Seconds between two looks at the memory."""


def anonymous_bytes() -> int:
    """Return this process's resident anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this script needs Linux.")


class Peak:
    """A context that looks for the largest `anonymous_bytes`.

    Attributes:
        bytes: the largest so far.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.bytes = max(self.bytes, anonymous_bytes())


def make(folder: Path, layers: int, sizes: argparse.Namespace) -> None:
    """Write a random Llama, float32, without ever holding more than one tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=sizes.hidden // 64,
        num_key_value_heads=sizes.hidden // 64,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    shards = sorted({shard_of(name) for name in state})
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.ones(x.shape)
            if x.dim() == 1
            else torch.randn(x.shape, generator=generator) * 0.05
            for name, x in state.items()
            if shard_of(name) == shard
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_of(name: str) -> str:
    """Return the part of a model that a parameter is of: a layer, or all else."""
    return name.split(".")[2] if ".layers." in name else ""


def measure(folder: Path, sizes: argparse.Namespace) -> dict[str, Any]:
    """Compress the model in `folder` and return what it took, in bytes and seconds."""
    import torch

    from cerwu_gpu import compress
    from cerwu_gpu.config import Batches, CompressionConfig

    generator = torch.Generator().manual_seed(1)
    shape = (sizes.samples, sizes.sequence)
    tokens = torch.randint(sizes.vocabulary, shape, generator=generator)
    config = CompressionConfig(calibration=Batches(inputs=[tokens]))
    imports = anonymous_bytes()
    with Peak() as peak:
        output = folder.with_name("small")
        report = compress(folder, output, config=config, device="cpu", progress=False)
    hidden, inner = sizes.hidden, sizes.intermediate
    block = 4 * (4 * hidden**2 + 3 * hidden * inner)
    hessians = 4 * (3 * hidden**2 + inner**2)
    activations = 4 * tokens.numel() * hidden
    return {
        "after imports": imports,
        "peak": peak.bytes,
        "block in float32": block,
        "its Hessians": hessians,
        "its cross moments": hessians if config.corrects_drift else 0,
        "activations": activations * (2 if config.corrects_drift else 1),
        "bits per weight": report.bits_per_weight,
        "seconds": report.seconds,
    }


def added(result: dict[str, Any]) -> float:
    """Return the peak less the memory after the imports [bytes]."""
    return float(result["peak"] - result["after imports"])


def described(result: dict[str, Any]) -> str:
    """Return the memory of one model in words."""
    peak, imports, more, most = (
        f"{x / MEGABYTE:.0f}"
        for x in (result["peak"], result["after imports"], added(result), bound(result))
    )
    return f"peak {peak} MB of RssAnon, {imports} of them imports; {more} added, bound {most}"


def bound(result: dict[str, Any]) -> float:
    """Return the largest peak after the imports [bytes] that the model's block allows."""
    parts = ("block in float32", "its Hessians", "activations")
    return SHARE * sum(result[part] for part in parts) + ROOM * MEGABYTE


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return 1 where a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="for the models; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one is not None:
        print(json.dumps(measure(given.folder, given)))
        return 0
    results = {}
    for layers in given.layers:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            model = Path(folder) / "model"
            make(model, layers, given)
            results[layers] = in_process(model, layers, given)
        print(f"{layers} layers: {described(results[layers])}", flush=True)
    peaks = [result["peak"] for result in results.values()]
    print(f"largest over smallest peak: {max(peaks) / min(peaks):.3f}")
    if given.json:
        sizes = {name: getattr(given, name) for name in SIZES}
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        content = {"machine": machine, "sizes": sizes, "layers": results}
        given.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(any(added(result) > bound(result) for result in results.values()))


SIZES = ("hidden", "intermediate", "vocabulary", "samples", "sequence")
"""Names of the options that describe a model and its calibration data."""


def in_process(folder: Path, layers: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return what `measure` returns in a new process."""
    options = [x for name in SIZES for x in (f"--{name}", str(getattr(given, name)))]
    command = [sys.executable, __file__, "--one", str(layers), "--folder", str(folder), *options]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
