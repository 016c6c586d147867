"""The public functions: compress a model, and make a model a sweep's subject."""

import hashlib
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cerwu_gpu.calibration.cache import tensors_digest
from cerwu_gpu.calibration.running import placed, weight_source
from cerwu_gpu.checkpoint.names import source_names
from cerwu_gpu.compression.adapter import Adapter
from cerwu_gpu.compression.report_files import check_reports, report_paths, write_report
from cerwu_gpu.compression.resume import settings_fingerprint
from cerwu_gpu.compression.run import Run, plain_tensors, take_part
from cerwu_gpu.compression.target import to_target
from cerwu_gpu.config import (
    Batches,
    Calibration,
    CompressionConfig,
    ImageCalibration,
    ImageTextCalibration,
)
from cerwu_gpu.container.output import check_apart, check_output
from cerwu_gpu.container.work import WorkDirectory, output_places, work_directory, work_path
from cerwu_gpu.container.writer import check_storable
from cerwu_gpu.device import find_device
from cerwu_gpu.errors import CalibrationError, ConfigError, ModelError, OutputError
from cerwu_gpu.files import local_path, resolved
from cerwu_gpu.hf.card import card_of
from cerwu_gpu.hf.causal_lm import CausalLM, runs_whole
from cerwu_gpu.hf.classifier import ImageClassifier, WholeModel
from cerwu_gpu.hf.evaluation import perplexity
from cerwu_gpu.hf.image_text import ImagesAndText, has_image_tower, image_text_batches
from cerwu_gpu.hf.images import compare_on_images, load_images
from cerwu_gpu.hf.kinds import KINDS, Kind, kind_of, load_kind
from cerwu_gpu.hf.models import (
    LoadedModel,
    bytes_of_original,
    require_predictions,
    require_tokenizer,
)
from cerwu_gpu.hf.sources import calibration_files, with_sources
from cerwu_gpu.hf.trial import require_runs, sentence_of
from cerwu_gpu.hf.whole_text import WholeLM
from cerwu_gpu.models.module import ModuleAdapter
from cerwu_gpu.models.selection import require_values
from cerwu_gpu.progress import Clock
from cerwu_gpu.ranks import Ranks
from cerwu_gpu.report import Report
from cerwu_gpu.serving.loading import load_compressed
from cerwu_gpu.serving.opening import check_before, check_written
from cerwu_gpu.sweep.model import Measure, ModelSubject, shared_hessians


def compress(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    config: CompressionConfig | None = None,
    device: str | torch.device | Ranks | None = None,
    overwrite: bool = False,
    restart: bool = False,
    card: bool = False,
    report: str | Path | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Report:
    """Compress a model into a directory that `load_compressed` reads.

    Language models are calibrated by text (`Calibration`) or tokens; image classifiers of
    transformers by images (`ImageCalibration`), vision-language models by text or by both
    (`ImageTextCalibration`); classifiers and any plain torch module, whose linear
    layers and 2-D convolutions are compressed, by batches of their inputs (`Batches`).

    Args:
        model: hub name, local directory or .gguf file, of which a language model is read block by
            block; or a model in memory, which is changed in place: afterwards it holds the
            quantized weights.
        output: directory to write; it appears when it is complete.
        config: objective, grid and calibration data; default CompressionConfig().
        device: of the work; default: the GPU where there is one, else the CPU. Or the processes
            that share the work, each on its own device (`ranks.joined`): each of them makes this
            call and gets the report; rank 0 alone writes.
        overwrite: replace a compressed directory at `output`; nothing else is ever replaced.
        restart: discard an unfinished run instead of continuing it.
        card: write a model card for the Hugging Face Hub (README.md).
        report: directory for report.json and report.html; default: beside the output, as
            OUTPUT.report.json and OUTPUT.report.html.
        progress: show bars on stderr.
        trust_remote_code: allow code from the model's repository to run.

    Returns:
        Sizes and losses of everything stored, and the events of the run.

    Raises:
        CerwuError: a subclass that names the error; nothing is left at `output` then.
        OutputError: the disk refuses a write, or an unfinished run for `output` had other settings;
            finished work is kept beside it (docs/resume.md).
        RankError: another rank has ended; finished work is kept.
        KeyboardInterrupt: with a message that names the directory of the finished work.
    """
    ranks = device if isinstance(device, Ranks) else Ranks(device=device)
    config, target, clock = config or CompressionConfig(), find_device(ranks.device), Clock()
    ranks.agree(partial(check_ranks, config, ranks))
    progress = progress and ranks.first
    given = Path(output)
    output = resolved(given)
    paths = report_paths(output, None if report is None else Path(report))
    places = output_places(output)
    calibration = config.calibration
    texts, images = _names(config)
    read = {
        "the model": None if isinstance(model, nn.Module) else model,
        **calibration_files(config),
        "the images": images,
        "the Hessian cache": config.hessian_cache,
        "the report": None if report is None else paths[0],
    }

    def check_places() -> None:
        check_apart(places, read)
        check_reports(paths)
        check_output(output, overwrite=overwrite)

    ranks.from_first(check_places)
    if config.drift == "auto" and texts is not None and not config.corrects_drift:
        config = replace(config, drift="ignore")  # so that the report repeats the run as it was
    if isinstance(model, nn.Module):
        check_calibration(model, config)
    with ExitStack() as stack:
        opened: list[WorkDirectory] = []  # on rank 0

        def open_work() -> None:
            opened.append(stack.enter_context(work_directory(output, restart=restart)))
            opened[0].expect(settings_fingerprint(config, target))

        ranks.from_first(open_work)
        with clock.stage("load"):

            def build(kind: Kind, known: LoadedModel) -> CausalLM:
                made: Any = kind.adapter
                options = {"device": target, "ranks": ranks, "progress": progress}
                language: CausalLM = made(known, config, **options)
                return language

            loaded = ranks.agree(partial(_loaded, model, config, trust_remote_code, build))
            check_takes_ranks(loaded, ranks)
            calibrated, pairs = config, _pairs(loaded, config)
            if pairs is not None:
                loaded, calibrated = _with_pairs(loaded, config, pairs)
            elif loaded.kind is not None and isinstance(calibration, ImageCalibration):
                calibrated = replace(
                    config, calibration=_image_batches(model, loaded.kind, calibration)
                )
            # The work directory is that of the settings as they were given.
            loaded, calibrated = _distilled(loaded, calibrated, build)
            check_calibration(loaded.module, calibrated)
            check_apart(places, {"the model": loaded.files})
            carried = None if loaded.loaded is None else loaded.loaded.names.carried
            original_bytes = bytes_of_original(model, loaded.module, carried)
        # Other machines than rank 0's need not have the work directory.
        folder = work_path(output) if ranks.local else Path(tempfile.gettempdir())
        adapter = _adapter(
            loaded, calibrated, folder, target, clock, card, progress, trust_remote_code
        )
        # So that the report repeats the run as it was.
        repeated = replace(config, distillation=calibrated.distillation)
        if pairs is not None:
            repeated = replace(repeated, calibration=pairs)
        repeated = with_sources(repeated, adapter.usual_sources)
        texts, _ = _names(repeated)
        if card:
            transformer = isinstance(loaded.module, PreTrainedModel)
            loader = (loaded.kind or KINDS[0]).loader if transformer else None
            model_card = card_of(model, loaded.files, original_bytes, texts, loader)
            adapter.card = partial(model_card.write_judged, predictions=adapter.predictions)
        others = {**plain_tensors(adapter.module, adapter.layouts), **adapter.carried}
        check_storable(adapter.layouts, {name: x.dtype for name, x in others.items()})

        def begin() -> None:
            opened[0].begin({**settings_fingerprint(config, target), **adapter.identity()})

        ranks.from_first(begin)
        if not ranks.first:
            take_part(adapter, calibrated, clock)
            return ranks.from_first(partial(_of_rank_0, None))
        check = partial(check_written, trust_remote_code=trust_remote_code)
        with Run(
            adapter,
            output,
            clock=clock,
            overwrite=overwrite,
            verify=config.verify,
            work=folder,
            check=None if loaded.loaded is None else partial(check, adapter=adapter),
            progress=progress,
        ) as run:
            attempt = (
                run.attempt(calibrated) if config.target is None else to_target(run, calibrated)
            )
            attempt.writer.publish()
            result = run.report(attempt, original_bytes)
    unnamed = texts is None and not isinstance(repeated.calibration, ImageCalibration)
    repeatable = not unnamed and calibration.tokenizer is None
    try:
        write_report(
            paths,
            result,
            repeated,
            ranks.everywhere(target),
            model=str(model) if repeatable and not isinstance(model, nn.Module) else None,
            output=output,
            given=given,
            options={"card": card, "trust_remote_code": trust_remote_code},
        )
    except OutputError as error:  # the result is complete and counts
        result = replace(result, events=(*result.events, f"there is no report: {error}"))
    return ranks.from_first(partial(_of_rank_0, result))


def _names(config: CompressionConfig) -> tuple[tuple[str, ...] | None, str | None]:
    """Return the names of the texts that calibrate, None where there is none or one has no name,
    and that of the images, or None."""
    calibration = config.calibration
    if isinstance(calibration, ImageTextCalibration):
        return calibration.text.names, calibration.images
    texts = calibration.names if isinstance(calibration, Calibration) else None
    return texts, calibration.source if isinstance(calibration, ImageCalibration) else None


def _of_rank_0(report: Report | None) -> Report:
    """Return the report, which rank 0 has."""
    assert report is not None
    return report


def check_ranks(config: CompressionConfig, ranks: Ranks) -> None:
    """Refuse what several ranks cannot share yet.

    Raises:
        ConfigError: the first such setting.
    """
    if ranks.alone:
        return
    for given, what in (
        (config.target, "a search for a target"),
        (config.data_free, "quantization without data"),
        (config.distillation, "distillation (distill 0 is none)"),
        (config.hessian_cache, "a Hessian cache"),
        (_names(config)[1], "calibration by images"),
    ):
        if given:
            raise ConfigError(
                f"{what} does not run on several ranks: give lmbda and a text, or start one "
                "process without torchrun."
            )


def check_takes_ranks(source: "_Source", ranks: Ranks) -> None:
    """Refuse models that several ranks cannot share.

    Raises:
        ModelError: it is not calibrated block by block.
    """
    if not ranks.alone and not source.in_blocks:
        raise ModelError(
            f"{type(source.module).__name__} is not calibrated block by block: start one process "
            "without torchrun."
        )


@dataclass(frozen=True)
class _Source:
    """A model, in memory or read block by block.

    Attributes:
        kind: of a transformers model; None: any other module.
        loaded: a transformers model with its tokenizer and files; None: any other module.
        language: its adapter; None: it is not calibrated block by block.
    """

    module: Any
    kind: Kind | None
    loaded: LoadedModel | None
    language: CausalLM | None = None

    @property
    def files(self) -> Path | None:
        """Local directory of the source's files; None for a model that was in memory."""
        return None if self.loaded is None else self.loaded.files

    @property
    def takes_text(self) -> bool:
        """Whether the model is calibrated by text, if not by batches."""
        return self.kind is not None and self.kind.takes_text

    @property
    def in_blocks(self) -> bool:
        """Whether the model is calibrated block by block."""
        return self.kind is not None and self.kind.in_blocks


def _loaded(
    model: str | Path | nn.Module,
    config: CompressionConfig,
    trust_remote_code: bool,
    build: Callable[[Kind, LoadedModel], CausalLM],
) -> _Source:
    """Load a model of the kind that its configuration names; `build` returns its adapter if it is
    calibrated block by block."""
    given = config.calibration.tokenizer
    if isinstance(model, nn.Module):
        source = _in_memory(model)
        if source.kind is None:
            return source
        require_values(model)
        loaded = LoadedModel(source.module, given, None, source_names(source.module, None))
        source = _tried(replace(source, loaded=loaded), config, build)
        _require_runs(source)
        return source
    kind, loaded = load_kind(
        model, trust_remote_code=trust_remote_code, stream=not runs_whole(config)
    )
    if given is not None:
        loaded = replace(loaded, tokenizer=given, replaced=True)
    source = _tried(_Source(loaded.model, kind, loaded), config, build)
    if source.language is None and source.loaded and weight_source(source.module) is not None:
        _, whole = load_kind(model, trust_remote_code=trust_remote_code)
        loaded = replace(source.loaded, model=whole.model, names=whole.names)
        source = _Source(whole.model, source.kind, loaded)
    _require_runs(source)
    return source


def _require_runs(source: _Source) -> None:
    """Refuse a causal language model that is to run whole and does not run on tokens alone.

    Raises:
        ModelError: it is one.
    """
    if source.kind is not None and source.kind.adapter is WholeLM:
        require_runs(source.module)


def _tried(
    source: _Source, config: CompressionConfig, build: Callable[[Kind, LoadedModel], CausalLM]
) -> _Source:
    """Return a model with its adapter if it is calibrated block by block. A causal language model
    whose blocks cannot run one by one is one that runs whole, if it has no experts, which show
    their inputs only there; the reason is an event.

    Raises:
        ModelError: blocks cannot run one by one, and the model cannot be calibrated whole.
    """
    if source.kind is None or source.loaded is None or not source.kind.in_blocks:
        return source
    if _names(config)[1] is not None:  # images beside text: the whole model runs
        return source
    language = build(source.kind, source.loaded)
    obstacle = None if config.data_free else language.obstacle()  # without data nothing is run
    if obstacle is None:
        return replace(source, language=language)
    why = sentence_of(obstacle).rstrip(".")
    experts = any(len(layout.shape) > 2 for layout in language.layouts.values())
    if source.kind.adapter is not CausalLM or experts:
        raise ModelError(
            f"{type(source.module).__name__} cannot be calibrated block by block: {why}."
        ) from obstacle
    event = f"it runs whole, not block by block: {why}"
    loaded = replace(source.loaded, events=(*source.loaded.events, event))
    return _Source(source.module, replace(source.kind, adapter=WholeLM), loaded)


def _distilled(
    source: _Source, config: CompressionConfig, build: Callable[[Kind, LoadedModel], CausalLM]
) -> tuple[_Source, CompressionConfig]:
    """Return the settings without a distillation that an effort asks for, and the model with an
    event and an adapter that has it, where it cannot be distilled.

    Raises:
        ConfigError: it cannot, and the distillation was asked for by itself, or `config.strict`.
    """
    given, kind = config.distillation, source.kind
    if given is None or kind is None or kind.adapter.distils or source.loaded is None:
        return source, config
    event = f"{type(source.module).__name__} cannot be distilled"
    if given.required:
        raise ConfigError(f"{event}: drop distillation.")
    event = f"{event}: nothing is tuned after the quantization"
    if config.strict:
        raise ConfigError(f"{event} (strict): give distill 0.")
    loaded = replace(source.loaded, events=(*source.loaded.events, event))
    language = None if source.language is None else build(kind, loaded)
    source = replace(source, loaded=loaded, language=language)
    return source, replace(config, distillation=None)


def _in_memory(module: nn.Module) -> _Source:
    """Return a module as a source.

    Raises:
        ModelError: it is a transformers model of no known kind.
    """
    if not isinstance(module, PreTrainedModel):
        return _Source(module, None, None)
    kind = kind_of(module)
    if kind is None:
        kinds = ", nor of ".join(one.name.partition(" ")[2] for one in KINDS)
        raise ModelError(f"{type(module).__name__} is no class of {kinds}: it is not supported.")
    return _Source(module, kind, None)


def check_calibration(module: nn.Module, config: CompressionConfig) -> None:
    """Refuse calibration data that a model cannot take.

    Raises:
        ModelError: a plain module or an image classifier comes without batches, or a model of
            transformers is of no known kind.
        ConfigError: a language model comes with a loss.
    """
    source = _in_memory(module)
    if _names(config)[1] is not None:
        raise ConfigError(
            f"{type(module).__name__} is in memory, without an image processor: give Batches, or "
            "the model's directory."
        )
    batches = isinstance(config.calibration, Batches)
    if not source.takes_text and not batches and not config.data_free:
        raise ModelError(
            f"{type(module).__name__} is no language model: give batches of its inputs to "
            "calibrate."
        )
    if source.in_blocks and isinstance(config.calibration, Batches) and config.calibration.loss:
        raise ConfigError("a language model has a loss of its own: drop the loss.")


def _pairs(source: _Source, config: CompressionConfig) -> ImageTextCalibration | None:
    """Return the images and the text that calibrate a model; None where there are no images, or
    they come alone for a model that takes no text.

    Raises:
        ModelError: there is text beside the images, and the model does not take both.
    """
    given, kind = config.calibration, source.kind
    both = kind is not None and kind.adapter is CausalLM and has_image_tower(source.module)
    if isinstance(given, ImageTextCalibration):
        if not both:
            name, what = (
                type(source.module).__name__,
                "no known kind" if kind is None else kind.name,
            )
            raise ModelError(
                f"{name} is {what}, which does not take images and text together: drop images, or "
                "calibration, sequence_length and tokens_per_column."
            )
        return given
    if both and isinstance(given, ImageCalibration):
        text = Calibration(samples=given.samples, batch_size=given.batch_size, seed=given.seed)
        return ImageTextCalibration(images=given.source, text=text)
    return None


def _with_pairs(
    source: _Source, config: CompressionConfig, given: ImageTextCalibration
) -> tuple[_Source, CompressionConfig]:
    """Return a vision-language model as one that runs whole, and the settings with batches of
    images and text.

    Raises:
        CalibrationError: a text is shorter than asked for, with `config.strict`.
    """
    assert source.kind is not None and source.loaded is not None
    batches, events = image_text_batches(source.loaded, config, given)
    if events and config.strict:
        raise CalibrationError(f"{events[0]} (strict)")
    loaded = replace(source.loaded, events=(*source.loaded.events, *events))
    kind = replace(source.kind, adapter=ImagesAndText)
    calibration = Batches(inputs=batches, seed=given.seed)
    return _Source(source.module, kind, loaded), replace(config, calibration=calibration)


def _image_batches(model: str | Path | nn.Module, kind: Kind, given: ImageCalibration) -> Batches:
    """Return the images of a calibration as batches of the model's inputs.

    Raises:
        ModelError: the model is no image classifier.
    """
    if kind.adapter is not ImageClassifier:
        raise ModelError(
            f"{model} is {kind.name}: images are for classifiers and vision-language models."
        )
    pixels = load_images(
        given.source,
        str(model),
        part="calibration",
        count=given.samples,
        batch_size=given.batch_size,
        seed=given.seed,
    )
    return Batches(inputs=pixels.batches, seed=given.seed)


def _adapter(
    source: _Source,
    config: CompressionConfig,
    work: Path,
    device: torch.device,
    clock: Clock,
    card: bool,
    progress: bool,
    trust_remote_code: bool,
) -> Adapter:
    """Return the adapter of a model, with its calibration data."""
    # Whole modules are calibrated anew in each sequential pass.
    searching = config.target is not None and not config.data_free
    searching = searching and not (config.sequential and not source.in_blocks)
    cache = config.hessian_cache or (work / "hessians" if searching else None)
    language = source.language
    if language is not None:
        with clock.stage("load"):
            check_before(language, trust_remote_code)
        with clock.stage("calibrate"):
            language.calibrate(config, hessian_cache=cache, work=work, judged=card)
        return language
    with clock.stage("calibrate"):
        options: Any = {"device": device, "hessian_cache": cache, "work": work}
        if source.kind is None or source.loaded is None:
            return ModuleAdapter(source.module, config, progress=progress, **options)
        whole: Any = source.kind.adapter
        adapter: WholeModel = whole(source.loaded, config, progress=progress, **options)
        check_before(adapter, trust_remote_code)
    return adapter


def text_subject(
    model: str | Path,
    base: CompressionConfig,
    text: str,
    hessian_cache: Path,
    *,
    context_length: int = 512,
    max_windows: int | None = None,
    batch_size: int = 4,
    device: str | torch.device | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> ModelSubject:
    """Return a causal language model as a subject, judged by a perplexity.

    Args:
        model: hub name, local directory or .gguf file.
        base: selection of weights and calibration, which the points share; with keep_head no point
            quantizes the head.
        text: evaluation text.
        hessian_cache: directory for Hessians and sensitivities.
        context_length, max_windows, batch_size: of the evaluation, as for `perplexity`.
        device: of the work and the evaluation.
        progress: show bars over calibration on stderr.

    Raises:
        CerwuError: a subclass that names the error.
    """
    base = shared_hessians(base)
    target = find_device(device)
    kind, loaded = load_kind(model, trust_remote_code=trust_remote_code)
    if not issubclass(kind.adapter, CausalLM):
        judged = f"has no perplexity: {'not supported' if kind.takes_text else 'give images'}"
        raise ModelError(f"{model} is {kind.name}, which {judged}.")
    require_predictions(loaded.model)
    tokenizer = require_tokenizer(loaded.tokenizer)
    adapter = kind.adapter(loaded, base, device=target, progress=progress)
    adapter.calibrate(base, hessian_cache=hessian_cache)

    def evaluate(module: Any) -> float:
        with placed(module, target):
            return perplexity(
                module,
                tokenizer,
                text,
                context_length=context_length,
                max_windows=max_windows,
                batch_size=batch_size,
            )

    description = {
        "evaluation text": hashlib.sha256(text.encode()).hexdigest(),
        "evaluation windows": f"{max_windows} of {context_length} tokens",
    }
    measure = Measure("perplexity", evaluate, partial(load_compressed, device=target), description)
    return _subject(model, adapter, measure, base)


def image_subject(
    model: str | Path,
    base: CompressionConfig,
    hessian_cache: Path,
    *,
    max_images: int | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> ModelSubject:
    """Return an image classifier as a subject, judged by its accuracy.

    Args:
        model: hub name or local directory.
        base: selection of weights and images, which the points share; the images' training part is
            for calibration, the test part for evaluation.
        hessian_cache: directory for Hessians and sensitivities.
        max_images: number of evaluation images; None: all.
        batch_size: images per forward pass.
        device: of the work and the evaluation.
        progress: show bars over calibration on stderr.

    Raises:
        CerwuError: a subclass that names the error.
    """
    images = base.calibration
    if not isinstance(images, ImageCalibration):
        raise ConfigError(
            "a sweep judges image classifiers by images, and language models by text: drop images, "
            "or calibration and its settings."
        )
    base, target = shared_hessians(base), find_device(device)
    kind, loaded = load_kind(model, trust_remote_code=trust_remote_code)
    if kind.adapter is not ImageClassifier:
        raise ModelError(f"{model} is {kind.name}, which no sweep judges by images: drop images.")
    base = replace(base, calibration=_image_batches(model, kind, images))
    config = loaded.model.config
    judging = load_images(
        images.source,
        model,
        part="evaluation",
        labels={name: int(number) for name, number in (config.label2id or {}).items()},
        count=max_images,
        batch_size=batch_size,
    )
    adapter = ImageClassifier(
        loaded, base, device=target, hessian_cache=hessian_cache, progress=progress
    )

    def evaluate(module: Any) -> float:
        return compare_on_images(module.to(target), judging).accuracy

    description = {"evaluation images": tensors_digest([*judging.batches, *(judging.labels or [])])}
    measure = Measure("accuracy", evaluate, partial(load_compressed, device=target), description)
    return _subject(model, adapter, measure, base)


def _subject(
    model: str | Path, adapter: Adapter, measure: Measure, base: CompressionConfig
) -> ModelSubject:
    name = local_path(model).resolve().name
    return ModelSubject(name, adapter, measure, base, bytes_of_original(model, adapter.module))
