"""vLLM plugin: `vllm serve` and `LLM` read compressed directories."""
