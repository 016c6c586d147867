"""The entry point of vLLM's general plugins, called in each of its processes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cerwu_gpu.spec import QUANT_METHOD

REGISTRY = "vllm.model_executor.model_loader"


def register() -> None:
    """Make the quantization method "cerwu" and its loader known to vLLM; may be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from cerwu_gpu.vllm.loader import CerwuLoader
    from cerwu_gpu.vllm.method import LOAD_FORMATS, CerwuConfig

    register_quantization_config(QUANT_METHOD)(CerwuConfig)
    with _quiet(REGISTRY):  # vLLM warns of every load format that gets another loader
        for load_format in LOAD_FORMATS:
            register_model_loader(load_format)(CerwuLoader)


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Hide a logger's warnings inside the context."""
    logging.getLogger(logger).addFilter(_is_error)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
