"""Greedy continuations by vLLM of several directories, one after the other.

python generate.py JOBS RESULTS: JOBS is a JSON list of {"model": directory, ...arguments of LLM};
RESULTS gets a JSON list of lists of token ids, one for each prompt. vLLM changes the process that
it runs in, so that each job has a fork of one that has imported it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

PROMPTS = [[3, 1 + 4 * number, 5, 2 + 7 * number % 60, 11] for number in range(5)]
"""Token ids that every toy's vocabulary has."""


def continuations(job: dict[str, Any], length: int = 16) -> list[list[int]]:
    """Return the tokens that follow each prompt."""
    from vllm import LLM, SamplingParams

    settings = {
        "dtype": "float32",
        "max_model_len": 64,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    llm = LLM(**{**settings, **job})
    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    import vllm  # noqa: F401

    results = Path(sys.argv[2])
    results.write_text("[]", encoding="utf-8")
    for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if (child := os.fork()) == 0:
            tokens = continuations(one)
            before = json.loads(results.read_text(encoding="utf-8"))
            results.write_text(json.dumps([*before, tokens]), encoding="utf-8")
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{one} failed")
