"""The public doors: a model in, a compressed directory out."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.calibration.running import Batch
from cerwu_gpu.calibration.sensitivity import Loss
from cerwu_gpu.compression.adapter import Adapter
from cerwu_gpu.compression.report_files import check_reports, report_paths, write_report
from cerwu_gpu.compression.resume import settings_fingerprint
from cerwu_gpu.compression.run import Run
from cerwu_gpu.compression.target import to_target
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.output import check_apart, check_output
from cerwu_gpu.container.work import output_places, work_directory
from cerwu_gpu.device import find_device
from cerwu_gpu.errors import ConfigError, ModelError
from cerwu_gpu.hf.card import card_of
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.classifier import ImageClassifier, load_classifier
from cerwu_gpu.hf.kinds import kind_of
from cerwu_gpu.hf.models import LoadedModel, bytes_of_original, load_model
from cerwu_gpu.hf.text import text_file
from cerwu_gpu.models.module import ModuleAdapter
from cerwu_gpu.progress import Clock
from cerwu_gpu.report import Report


def compress(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    batches: Iterable[Batch] | None = None,
    config: CompressionConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | None = None,
    loss: Loss | None = None,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    restart: bool = False,
    hessian_cache: str | Path | None = None,
    verify: bool = True,
    card: bool = False,
    report: str | Path | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Report:
    """Compress a model into a directory that `load_compressed` reads.

    Without `batches` it is a causal language model. With them it is an image classifier of
    transformers or any plain torch module, whose linear layers and 2-D convolutions are compressed.

    Args:
        model: hub name, local directory, .gguf file, or a model in memory; the latter is changed
            in place: afterwards it holds the quantized weights.
        output: directory to write; it appears when it is complete.
        batches: inputs that calibrate, each a tensor, a tuple or a dict of arguments, without
            labels; the first axis counts samples, and lmbda is per sample. They are run several
            times, so all are kept.
        config: what to minimise; default CompressionConfig().
        tokenizer: for a model in memory, or instead of the source's own.
        text: calibration text instead of what config.calibration names.
        loss: with batches, (the module's output, the batch) -> one loss per sample in nats, for
            the sensitivities; default: the output is taken for logits [samples, classes]
            (calibration/sensitivity.py).
        device: where blocks are worked on; default: the GPU where there is one, else the CPU.
        overwrite: replace a compressed directory at `output`; nothing else is ever replaced.
        restart: drop what an unfinished run has kept instead of continuing it.
        hessian_cache: directory that keeps the Hessians for the next run.
        verify: decode what was written and compare it with the weights in memory.
        card: write a model card for the Hugging Face Hub (README.md); for language models.
        report: directory for report.json and report.html; default: beside the output, as
            OUTPUT.report.json and OUTPUT.report.html.
        progress: show bars on stderr.
        trust_remote_code: allow code from the model's repository to run.

    Returns:
        What was stored, how large it is, and what did not go as planned.

    Raises:
        CerwuError: a subclass that says what is wrong; nothing is left at `output` then.
        OutputError: the disk refuses something, or an unfinished run for `output` was another
            one; what is finished is kept beside it (docs/resume.md).
        KeyboardInterrupt: with the sentence that says where the work is kept.
    """
    config, target, clock = config or CompressionConfig(), find_device(device), Clock()
    given = Path(output)
    output = given.expanduser().resolve()
    paths = report_paths(output, None if report is None else Path(report))
    places = output_places(output)
    cache = None if hessian_cache is None else Path(hessian_cache)
    read = {
        "the model": None if isinstance(model, nn.Module) else model,
        "the calibration text": text_file(config.calibration),
        "the Hessian cache": cache,
        "the report": None if report is None else paths[0],
    }
    check_apart(places, read)
    check_reports(paths)
    check_output(output, overwrite=overwrite)
    _check_data(model, batches, {"tokenizer": tokenizer, "text": text, "card": card or None}, loss)
    repeatable = batches is None and text is None and tokenizer is None
    leave = partial(
        write_report,
        paths,
        device=target,
        model=str(model) if repeatable and not isinstance(model, nn.Module) else None,
        output=output,
        given=given,
        options={"card": card, "trust_remote_code": trust_remote_code},
    )
    if batches is None:
        config = config.with_drift_decided(hessians_kept=hessian_cache is not None)
    with work_directory(output, restart=restart) as work:
        work.expect(settings_fingerprint(config, target))
        if cache is None and config.targeted and not (batches is not None and config.sequential):
            cache = work.path / "hessians"
        with clock.stage("load"):
            loaded = _loaded(model, tokenizer, batches is not None, trust_remote_code)
            check_apart(places, {"the model": loaded.files})
            original_bytes = bytes_of_original(model, loaded.module)
        adapter: Adapter
        if batches is None:
            with clock.stage("load"):
                adapter = language = CausalLM(
                    LoadedModel(loaded.module, loaded.tokenizer, loaded.files),
                    config,
                    device=target,
                    progress=progress,
                )
            with clock.stage("calibrate"):
                language.calibrate(
                    config, text=text, hessian_cache=cache, work=work.path, judged=card
                )
            if card:
                named = config.calibration if text is None else None
                language.card = card_of(model, loaded.files, original_bytes, named)
        else:
            with clock.stage("calibrate"):
                adapter = _module_adapter(loaded.module)(
                    loaded.module,
                    batches,
                    config,
                    loss=loss,
                    device=target,
                    hessian_cache=cache,
                    work=work.path,
                    progress=progress,
                )
            if isinstance(adapter, ImageClassifier):
                adapter.files = loaded.files
        work.begin({**settings_fingerprint(config, target), **adapter.identity()})
        with Run(
            adapter,
            output,
            clock=clock,
            overwrite=overwrite,
            verify=verify,
            card=card,
            work=work.path,
            progress=progress,
        ) as run:
            attempt = to_target(run, config) if config.targeted else run.attempt(config)
            attempt.writer.publish()
            result = run.report(attempt, original_bytes)
    leave(result, config)
    return result


def _check_data(
    model: object,
    batches: Iterable[Batch] | None,
    language: dict[str, object],
    loss: Loss | None,
) -> None:
    """Refuse batches beside what only language models take, and modules without batches.

    Args:
        language: name -> value of arguments that only language models take.

    Raises:
        ConfigError: both are given, or a loss without batches.
        ModelError: a plain module or an image classifier comes without batches.
    """
    if batches is not None:
        for name, value in language.items():
            if value is not None:
                raise ConfigError(f"{name} is for language models: drop it, or drop batches.")
        return
    if loss is not None:
        raise ConfigError("loss is for models that are calibrated by batches: drop it.")
    if isinstance(model, nn.Module):
        kind = kind_of(model) if isinstance(model, PreTrainedModel) else None
        if not isinstance(model, PreTrainedModel) or (kind is not None and not kind.takes_text):
            raise ModelError(
                f"{type(model).__name__} is no language model: give batches of its inputs to "
                "calibrate."
            )


@dataclass(frozen=True)
class _Source:
    """A model in memory, with what came with it.

    Attributes:
        files: local directory of the source's own files; None for a model that was in memory.
    """

    module: Any
    tokenizer: PreTrainedTokenizerBase | None
    files: Path | None


def _loaded(
    model: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    on_batches: bool,
    trust_remote_code: bool,
) -> _Source:
    if isinstance(model, nn.Module):
        return _Source(model, tokenizer, None)
    if on_batches:
        module, files = load_classifier(model, trust_remote_code)
        return _Source(module, None, files)
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        return _Source(loaded.model, loaded.tokenizer, loaded.files)
    return _Source(loaded.model, tokenizer, None)


def _module_adapter(module: nn.Module) -> type[ModuleAdapter]:
    """Return the adapter of a module that is calibrated by batches.

    Raises:
        ModelError: it is a model of transformers that takes text.
    """
    if not isinstance(module, PreTrainedModel):
        return ModuleAdapter
    kind = kind_of(module)
    if kind is None or kind.takes_text:
        raise ModelError(
            f"{type(module).__name__} is no image classifier: batches are for those and plain "
            "modules."
        )
    return ImageClassifier
