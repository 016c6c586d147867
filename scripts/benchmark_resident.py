"""Measure the memory that resident="compressed" saves and the time it costs, beside dense loading.

Each way of loading runs in a fresh process: it imports everything, notes its peak memory, loads the
model, runs one forward pass over a prompt and generates greedily. Peaks are of the resident set;
the memory of the model is the peak less the peak after the imports.

    python scripts/benchmark_resident.py SMALL --original MODEL
"""

import argparse
import hashlib
import json
import platform
import resource
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WAYS = ("original", "from_pretrained", "dense", "compressed")
PROMPT_TOKENS = 64


def peak_bytes() -> int:
    """Return the largest resident set of this process so far.

    On Linux the peak that getrusage knows may be that of the process which started this one.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(way: str, path: str, tokens: int) -> dict[str, Any]:
    """Load `path` in this process and run it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cerwu_gpu import load_compressed

    # The module of the model's class, which would count as the model's memory otherwise.
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(path))]
    imported, begin = peak_bytes(), perf_counter()
    if way in ("original", "from_pretrained"):
        model: Any = AutoModelForCausalLM.from_pretrained(path)
    else:
        model = load_compressed(path, resident=way)
    loaded, prompt = perf_counter(), torch.arange(PROMPT_TOKENS)[None]
    with torch.no_grad():
        logits = model(prompt).logits
    ran = perf_counter()
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.generate(prompt, attention_mask=mask, **options)
    return {
        "way": way,
        "dtype": str(model.dtype),
        "peak_bytes": peak_bytes(),
        "imports_bytes": imported,
        "model_bytes": peak_bytes() - imported,
        "seconds_to_load": loaded - begin,
        "seconds_of_a_forward": ran - loaded,
        "tokens_per_second": tokens / (perf_counter() - ran),
        "logits_sha256": hashlib.sha256(logits.float().numpy().tobytes()).hexdigest(),
    }


def in_fresh_process(way: str, path: str, tokens: int) -> dict[str, Any]:
    """Run `measure` in a new process and return its result."""
    command = [sys.executable, __file__, path, "--way", way, "--tokens", str(tokens)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="compressed directory")
    parser.add_argument("--original", help="the uncompressed model")
    parser.add_argument("--tokens", type=int, default=4, help="tokens to generate")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        print(json.dumps(measure(arguments.way, arguments.path, arguments.tokens)))
        return
    paths = {way: arguments.path for way in WAYS} | {"original": arguments.original}
    rows = [in_fresh_process(w, p, arguments.tokens) for w, p in paths.items() if p is not None]
    by_way = {row["way"]: row for row in rows}
    resident = by_way["compressed"]
    assert resident["logits_sha256"] == by_way["dense"]["logits_sha256"]
    assert resident["logits_sha256"] == by_way["from_pretrained"]["logits_sha256"]
    shares = {
        f"{kind}_of_{way}": resident[kind] / row[kind]
        for way, row in by_way.items()
        for kind in ("model_bytes", "peak_bytes")
        if way != "compressed"
    }
    from cerwu_gpu.container.reader import inventory

    quantized = [tensor for tensor in inventory(arguments.path).tensors if tensor.quantizer]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {platform.processor() or 'cpu'}",
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "prompt_tokens": PROMPT_TOKENS,
        "generated_tokens": arguments.tokens,
        "bits_per_weight": 8 * sum(x.bytes for x in quantized) / sum(x.weights for x in quantized),
        "quantized_weights": sum(tensor.weights for tensor in quantized),
        "ways": rows,
        "shares": shares,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
