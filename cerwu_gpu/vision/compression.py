"""From a plain torch module to a compressed directory."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cerwu_gpu.attempt import plain_bytes
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.output import check_output
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.progress import Clock
from cerwu_gpu.report import Report
from cerwu_gpu.vision.calibration import HESSIAN_BYTES, CalibratedLayers
from cerwu_gpu.vision.layers import find_weights, require_plain
from cerwu_gpu.vision.norms import following_norms
from cerwu_gpu.vision.running import Batch, held
from cerwu_gpu.vision.sensitivity import Loss, output_sensitivities
from cerwu_gpu.vision.targeting import to_target
from cerwu_gpu.vision.writing import Writing, nothing_more

LANGUAGE_FIELDS = {
    "keep_head": "exclude the last layer by its name",
    "max_perplexity_increase": "give lmbda",
}
"""Settings that only language models know -> what to do instead."""


def compress_module(
    module: nn.Module,
    output: Path,
    batches: Iterable[Batch],
    config: CompressionConfig,
    *,
    loss: Loss | None = None,
    device: torch.device | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: bool = True,
    hessian_bytes: int = HESSIAN_BYTES,
    companions: Callable[[Path], None] = nothing_more,
    clock: Clock | None = None,
) -> Report:
    """Compress a module's linear layers and 2-D convolutions; it gets the quantized weights.

    Batch norms follow them (norms.py) where `config.correct_drift` says so.

    Args:
        output: directory to write; it appears when it is complete.
        batches: inputs that calibrate (running.Batch); they are kept and run several times.
        loss: what the sensitivities are of (sensitivity.py).
        device: where the module runs; None: where it is.
        hessian_bytes: how much the Hessians of one run over the batches may take.
        companions: writes further files into the directory.

    Raises:
        CerwuError: a subclass that says what is wrong; nothing is left at `output` then.
    """
    _check_settings(config)
    check_output(output, overwrite=overwrite)
    require_plain(module)
    clock = clock or Clock()
    weights = find_weights(module, config.include, config.exclude)
    chosen = weights.chosen
    events = [f"{name}: left as it is, {weights.left[name]} coded" for name in weights.small]
    if events and config.strict:
        raise ConfigError(f"{events[0]} (strict): exclude it.")
    layouts = {layout.name: layout for layout in chosen}
    kept = held(batches)
    target = device or module.get_parameter(chosen[0].name).device
    gradients: Mapping[tuple[str, int], Tensor] = {}
    if config.needs_gradients:
        with clock.stage("sensitivity"):
            gradients = output_sensitivities(
                module, chosen, kept, loss=loss, device=target, seed=config.seed, progress=progress
            )
    with clock.stage("calibrate"):
        blocks = CalibratedLayers(
            module,
            chosen,
            kept,
            device=target,
            hessian_bytes=hessian_bytes,
            sequential=config.sequential,
            seed=config.seed,
            progress=progress,
        )
        norms = following_norms(module, kept, config, device=target, progress=progress)
    original = plain_bytes(module, {})
    with Writing(module, layouts, output, overwrite, verify, companions, clock, norms) as writing:
        if config.targeted:
            attempt = to_target(writing, blocks, gradients, config)
        else:
            attempt = writing.attempt(blocks, gradients, config)
        attempt.writer.publish()
    return Report(
        layers=attempt.layers,
        lmbda=attempt.lmbda,
        bits_per_weight=attempt.bits_per_weight,
        directory_bytes=attempt.directory_bytes,
        original_bytes=original,
        seconds=clock.seconds,
        events=(*events, *attempt.events(layouts)),
        left=weights.left,
    )


def _check_settings(config: CompressionConfig) -> None:
    for field, remedy in LANGUAGE_FIELDS.items():
        if getattr(config, field):
            raise ConfigError(f"{field} is for language models: {remedy}.")
