"""From a model to a compressed directory: the whole way (design.md section 3)."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.attempt import Attempt, plain_bytes
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.output import check_apart, check_output
from cerwu_gpu.container.work import output_places, work_directory
from cerwu_gpu.errors import ModelError
from cerwu_gpu.hf.attempt import Attempts
from cerwu_gpu.hf.card import card_of
from cerwu_gpu.hf.classifiers import check_batches, compress_on_batches
from cerwu_gpu.hf.device import find_device
from cerwu_gpu.hf.fingerprint import settings_fingerprint, source_fingerprint
from cerwu_gpu.hf.models import LoadedModel, load_model
from cerwu_gpu.hf.report_files import check_reports, report_paths, write_report
from cerwu_gpu.hf.source import Source
from cerwu_gpu.hf.structure import Weights, find_weights
from cerwu_gpu.hf.targeting import to_target
from cerwu_gpu.hf.text import text_file
from cerwu_gpu.progress import Clock
from cerwu_gpu.report import Report
from cerwu_gpu.vision.running import Batch
from cerwu_gpu.vision.sensitivity import Loss


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
            (vision/sensitivity.py).
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
    config, target = config or CompressionConfig(), find_device(device)
    given, clock = Path(output), Clock()
    output = given.expanduser().resolve()
    paths = report_paths(output, None if report is None else Path(report))
    places = output_places(output)
    read = {
        "the model": None if isinstance(model, nn.Module) else model,
        "the calibration text": text_file(config.calibration),
        "the Hessian cache": None if hessian_cache is None else Path(hessian_cache),
        "the report": None if report is None else paths[0],
    }
    check_apart(places, read)
    check_reports(paths)
    check_output(output, overwrite=overwrite)
    leave = partial(
        write_report,
        paths,
        device=target,
        model=None if isinstance(model, nn.Module) or text or tokenizer else str(model),
        output=output,
        given=given,
        options={"card": card, "trust_remote_code": trust_remote_code},
    )
    check_batches(
        model,
        batches,
        {
            "tokenizer": tokenizer,
            "text": text,
            "hessian_cache": hessian_cache,
            "card": card or None,
        },
    )
    if batches is not None:
        done = compress_on_batches(
            model,
            output,
            batches,
            config,
            loss=loss,
            device=target,
            overwrite=overwrite,
            verify=verify,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
        leave(done, config, model=None)
        return done
    assert not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel)
    config = config.with_drift_decided(hessians_kept=hessian_cache is not None)
    with work_directory(output, restart=restart) as work:
        work.expect(settings_fingerprint(config, target))
        with clock.stage("load"):
            loaded = _loaded(model, tokenizer, trust_remote_code)
            check_apart(places, {"the model": loaded.files})
            weights = find_weights(
                loaded.model, config.include, config.exclude, head=not config.keep_head
            )
            left = _events_of(weights, config)
            original_bytes = bytes_of_original(model, loaded.model)
        with clock.stage("calibrate"):
            source = Source.prepare(
                loaded,
                weights.chosen,
                config,
                text=text,
                device=target,
                hessian_cache=hessian_cache
                or (work.path / "hessians" if config.targeted else None),
                progress=progress,
                work=work.path,
                judged=card,
            )
        named = config.calibration if text is None else None
        work.begin({**settings_fingerprint(config, target), **source_fingerprint(source)})
        with Attempts(
            source,
            output,
            overwrite=overwrite,
            verify=verify,
            clock=clock,
            work=work.path,
            card=card_of(model, loaded.files, original_bytes, named) if card else None,
        ) as attempts:
            if config.targeted:
                attempt = to_target(attempts, config, clock)
            else:
                attempt = attempts.run(config)
            attempt.writer.publish()
    done = _report(attempt, source, original_bytes, clock)
    done = replace(done, left=weights.left, events=(*left, *done.events))
    leave(done, config)
    return done


def _events_of(weights: Weights, config: CompressionConfig) -> tuple[str, ...]:
    """What is left alone though nobody asked for it.

    Raises:
        ModelError: there is such a thing, and config.strict.
    """
    events = tuple(f"{name}: left as it is, {weights.left[name]}" for name in weights.unknown)
    if events and config.strict:
        raise ModelError(f"{events[0]} (strict): exclude it.")
    return events


def _report(attempt: Attempt, source: Source, original_bytes: int, clock: Clock) -> Report:
    return Report(
        layers=attempt.layers,
        lmbda=attempt.lmbda,
        bits_per_weight=attempt.bits_per_weight,
        directory_bytes=attempt.directory_bytes,
        original_bytes=original_bytes,
        seconds=clock.seconds,
        events=(*source.events, *attempt.events(source.layouts)),
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


def bytes_of_original(source: str | Path | PreTrainedModel, model: PreTrainedModel) -> int:
    """Bytes of a .gguf file, else of the dense weights as they were loaded, tied ones once."""
    if not isinstance(source, PreTrainedModel) and Path(source).suffix == ".gguf":
        return Path(source).expanduser().stat().st_size
    return plain_bytes(model, {})
