"""From a model to a compressed directory: the whole way (design.md section 3)."""

import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.writer import check_output
from cerwu_gpu.hf.attempt import Attempt, Attempts, plain_tensors
from cerwu_gpu.hf.device import find_device
from cerwu_gpu.hf.models import LoadedModel, load_model
from cerwu_gpu.hf.source import Source
from cerwu_gpu.hf.structure import find_weights
from cerwu_gpu.hf.targeting import to_target
from cerwu_gpu.pipeline import Clock
from cerwu_gpu.report import Report


def compress(
    model: str | Path | PreTrainedModel,
    output: str | Path,
    *,
    config: CompressionConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    hessian_cache: str | Path | None = None,
    verify: bool = True,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Report:
    """Compress a causal language model into a directory that `load_compressed` reads.

    Args:
        model: hub name, local directory, .gguf file, or a model in memory; the latter is changed
            in place: afterwards it holds the quantized weights.
        output: directory to write; it appears when it is complete.
        config: what to minimise; default CompressionConfig().
        tokenizer: for a model in memory, or instead of the source's own.
        text: calibration text instead of what config.calibration names.
        device: where blocks are worked on; default: the GPU where there is one, else the CPU.
        overwrite: replace a non-empty output.
        hessian_cache: directory that keeps the Hessians for the next run.
        verify: decode what was written and compare it with the weights in memory.
        progress: show bars on stderr.
        trust_remote_code: allow code from the model's repository to run.

    Returns:
        What was stored, how large it is, and what did not go as planned.

    Raises:
        CerwuError: a subclass that says what is wrong; nothing is left at `output` then.
    """
    config, target = config or CompressionConfig(), find_device(device)
    output, clock = Path(output).expanduser().resolve(), Clock()
    check_output(output, overwrite=overwrite)
    with clock.stage("load"):
        loaded = _loaded(model, tokenizer, trust_remote_code)
        chosen = find_weights(
            loaded.model, config.include, config.exclude, head=not config.keep_head
        ).chosen
    with tempfile.TemporaryDirectory() as scratch:
        kept = hessian_cache or (scratch if config.targeted else None)
        with clock.stage("calibrate"):
            source = Source.prepare(
                loaded,
                chosen,
                config,
                text=text,
                device=target,
                hessian_cache=kept,
                progress=progress,
            )
        with Attempts(source, output, overwrite=overwrite, verify=verify, clock=clock) as attempts:
            if config.targeted:
                attempt = to_target(attempts, config, clock)
            else:
                attempt = attempts.run(config)
            attempt.writer.publish()
    return _report(attempt, source, _original_bytes(model, loaded.model), clock)


def _report(attempt: Attempt, source: Source, original_bytes: int, clock: Clock) -> Report:
    of_layers = (
        f"{source.layouts[layer.name].key(layer.part)}: {event}"
        for layer in attempt.layers
        for event in layer.events
    )
    return Report(
        layers=attempt.layers,
        lmbda=attempt.lmbda,
        bits_per_weight=attempt.bits_per_weight,
        directory_bytes=attempt.directory_bytes,
        original_bytes=original_bytes,
        seconds=clock.seconds,
        events=(*source.events, *of_layers),
    )


def _loaded(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> LoadedModel:
    if isinstance(model, PreTrainedModel):
        model.eval()  # type: ignore[no-untyped-call]
        return LoadedModel(model, tokenizer, None)
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        return loaded
    return LoadedModel(loaded.model, tokenizer, None)


def _original_bytes(source: str | Path | PreTrainedModel, model: PreTrainedModel) -> int:
    """Bytes of a .gguf file, else of the dense weights as they were loaded, tied ones once."""
    if not isinstance(source, PreTrainedModel) and Path(source).suffix == ".gguf":
        return Path(source).expanduser().stat().st_size
    tensors = plain_tensors(model, {}).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
