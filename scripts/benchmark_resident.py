"""Measure the memory that resident="compressed" saves and the time it costs, beside dense loading.

Each way of loading runs in a fresh process: it imports everything, notes its peak memory, loads the
model, runs one forward pass over a prompt and generates greedily, one sequence and four. Peaks are
of the resident set; the memory of the model is the peak less the peak after the imports.

What limits resident="compressed" is decoding: in its process all blocks are decoded alone, too, in
turn with the generation. At least half of that pace is the bar.

    python scripts/benchmark_resident.py SMALL --original MODEL
    OMP_NUM_THREADS=1 python scripts/benchmark_resident.py SMALL --cpu-time   # beside other work
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WAYS = ("original", "from_pretrained", "dense", "compressed")
PROMPT_TOKENS = 64
BATCHES = (1, 4)
TURNS = 3
"""Number of measurements in turn, of which the fastest counts: other work only ever adds."""
BAR = 0.5
"""Smallest share of the decoder's pace, in tokens a second."""
RESULTS = ROOT / "scripts" / "results" / "resident.json"


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


def measure(
    way: str, path: str, tokens: int, clock: Callable[[], float] = perf_counter
) -> dict[str, Any]:
    """Load `path` in this process and run it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cerwu_gpu import load_compressed

    # The module of the model's class, which would count as the model's memory otherwise.
    AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(path))]
    imported, begin = peak_bytes(), clock()
    if way in ("original", "from_pretrained"):
        model: Any = AutoModelForCausalLM.from_pretrained(path)
    else:
        model = load_compressed(path, resident=way)
    loaded = clock()
    prompt = torch.arange(PROMPT_TOKENS)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        logits = model(prompt).logits
    result = {
        "way": way,
        "dtype": str(model.dtype),
        "seconds_to_load": loaded - begin,
        "seconds_of_a_forward": clock() - loaded,
        "logits_sha256": hashlib.sha256(logits.float().numpy().tobytes()).hexdigest(),
    }
    prompts = {str(batch): prompt.repeat(batch, 1) for batch in BATCHES}
    paces = {batch: pace(model, repeated, tokens, clock) for batch, repeated in prompts.items()}
    result["peak_bytes"] = used = peak_bytes()
    result["imports_bytes"], result["model_bytes"] = imported, used - imported
    decoder = Decoder(path, model) if way == "compressed" else None
    seconds: list[float] = []
    for _ in range(1, TURNS):
        for batch, repeated in prompts.items():
            paces[batch] = max(paces[batch], pace(model, repeated, tokens, clock))
        if decoder is not None:
            seconds.append(decoder.seconds(clock))
    result["tokens_per_second"] = paces["1"]
    result["tokens_per_second_by_batch"] = paces
    if decoder is not None:
        result["block_weights"] = decoder.weights
        result["million_symbols_per_second"] = decoder.weights / min(seconds) / 1e6
        result["share_of_bound"] = paces["1"] * min(seconds)
    return result


def pace(model: Any, prompt: Any, tokens: int, clock: Callable[[], float]) -> float:
    """Return tokens a second, of all sequences together, the pass over the prompt included."""
    import torch

    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    begin = clock()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return len(prompt) * tokens / (clock() - begin)


class Decoder:
    """The compressed weights of a model's blocks, and memory to decode them into.

    Attributes:
        weights: their number, each of which is decoded for each token.
    """

    def __init__(self, path: str, model: Any) -> None:
        from cerwu_gpu.container.reader import open_directory
        from cerwu_gpu.models.selection import find_blocks

        directory = open_directory(path)
        prefixes = [f"{prefix}." for prefix, _ in find_blocks(model)]
        names = list(directory.compressed())
        self._blocks = [
            directory.all_stored(name for name in names if name.startswith(prefix))
            for prefix in prefixes
        ]
        self._memory = {
            tuple(stored.entry.shape for stored in block): [stored.empty() for stored in block]
            for block in self._blocks
        }
        self.weights = sum(stored.entry.weights for block in self._blocks for stored in block)

    def seconds(self, clock: Callable[[], float]) -> float:
        """Return the seconds in which all are decoded, block by block."""
        from cerwu_gpu.container.reader import decode_stored

        begin = clock()
        for block in self._blocks:
            memory = self._memory[tuple(stored.entry.shape for stored in block)]
            for _ in decode_stored(block, memory):
                pass
        return clock() - begin


def in_fresh_process(way: str, path: str, tokens: int, *options: str) -> dict[str, Any]:
    """Run `measure` in a new process and return its result."""
    command = [sys.executable, __file__, path, "--way", way, "--tokens", str(tokens), *options]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def page(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| loaded as | seconds to load | memory of the model | tokens/s, one sequence | four |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["way"], f"{row['seconds_to_load']:.1f}", f"{row['model_bytes'] / 1e6:,.0f} MB"]
        cells += [f"{pace:.2f}" for pace in row["tokens_per_second_by_batch"].values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure all ways and print a table; return 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="compressed directory")
    parser.add_argument("--original", help="the uncompressed model")
    parser.add_argument("--tokens", type=int, default=4, help="tokens to generate")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file for the result")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count seconds of this process, not of the clock"
    )
    arguments = parser.parse_args()
    if arguments.way is not None:
        clock = process_time if arguments.cpu_time else perf_counter
        print(json.dumps(measure(arguments.way, arguments.path, arguments.tokens, clock)))
        return 0
    from cerwu_gpu.container.reader import inventory
    from scripts.benchmark_cpu import environment

    where = environment()
    paths = {way: arguments.path for way in WAYS} | {"original": arguments.original}
    options = ["--cpu-time"] if arguments.cpu_time else []
    rows = [
        in_fresh_process(way, path, arguments.tokens, *options)
        for way, path in paths.items()
        if path is not None
    ]
    assert len({row["logits_sha256"] for row in rows if row["way"] != "original"}) == 1
    quantized = [tensor for tensor in inventory(arguments.path).tensors if tensor.quantizer]
    result = {
        **where,
        "cpu_time": arguments.cpu_time,
        "prompt_tokens": PROMPT_TOKENS,
        "generated_tokens": arguments.tokens,
        "bits_per_weight": 8 * sum(x.bytes for x in quantized) / sum(x.weights for x in quantized),
        "quantized_weights": sum(tensor.weights for tensor in quantized),
        "ways": rows,
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(page(rows))
    share = next(row["share_of_bound"] for row in rows if row["way"] == "compressed")
    print(f"{share:.2f} of the decoder's pace (at least {BAR})")
    return int(share < BAR)


if __name__ == "__main__":
    sys.exit(main())
