"""From a model to a compressed directory: the whole way (design.md section 3)."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu import __version__
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.writer import DirectoryWriter, check_output
from cerwu_gpu.errors import CalibrationError, CorruptionError
from cerwu_gpu.hf.calibration import CalibratedBlocks
from cerwu_gpu.hf.device import find_device
from cerwu_gpu.hf.hessian_cache import HessianCache, StatedBlocks, cached_blocks, hessian_key
from cerwu_gpu.hf.models import TOKENIZER_FILES, LoadedModel, load_model
from cerwu_gpu.hf.structure import find_weights
from cerwu_gpu.hf.text import calibration_tokens
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.pipeline import Clock, compress_blocks
from cerwu_gpu.report import Report
from cerwu_gpu.spec import FORMAT_VERSION, QUANT_METHOD

COPIED_FILES = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
)
"""Files that go into the compressed directory as they came."""
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*")


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
    config, device = config or CompressionConfig(), find_device(device)
    output, clock = Path(output), Clock()
    check_output(output, overwrite=overwrite)
    with clock.stage("load"):
        loaded = _loaded(model, tokenizer, trust_remote_code)
        chosen = find_weights(loaded.model, config.include, config.exclude).chosen
    layouts = {layout.name: layout for layout in chosen}
    original_bytes = _dense_bytes(loaded.model)
    with clock.stage("calibrate"):
        blocks, events = _blocks(
            loaded, list(layouts.values()), config, text, device, hessian_cache, progress
        )
    if config.strict and events:
        raise CalibrationError(f"{events[0]} (strict)")
    parameters = dict(loaded.model.named_parameters())
    dtypes = {name: parameters[name].dtype for name in layouts}
    generator = f"cerwu_gpu {__version__}"
    with DirectoryWriter(output, generator=generator, overwrite=overwrite) as writer:
        layers = compress_blocks(blocks, layouts, dtypes, writer, config, clock)
        with clock.stage("write"):
            for name, tensor in plain_tensors(loaded.model, layouts).items():
                writer.add_plain(name, tensor)
            _write_companions(loaded, writer.folder)
            writer.complete()
        if verify:
            with clock.stage("verify"):
                _verify(writer.folder, parameters, progress)
        writer.publish()
    events += tuple(f"{layer.name}: {event}" for layer in layers for event in layer.events)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    stored = sum(layer.words_bytes + layer.side_bytes for layer in layers)
    return Report(
        layers=tuple(layers),
        bits_per_weight=8 * stored / weights,
        directory_bytes=directory_bytes(output),
        original_bytes=original_bytes,
        seconds=clock.seconds,
        events=events,
    )


def plain_tensors(model: PreTrainedModel, layouts: Mapping[str, WeightLayout]) -> dict[str, Tensor]:
    """What is stored as it is: every other entry of the state dict, tied weights once."""
    compressed = {id(model.get_parameter(name)) for name in layouts}
    seen: set[int] = set()
    plain = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and id(tensor) not in compressed:
            plain[name] = tensor
        seen.add(id(tensor))
    return plain


def directory_bytes(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


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


def _dense_bytes(model: PreTrainedModel) -> int:
    """Bytes of the dense weights in the dtype they have in memory, tied ones once."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in plain_tensors(model, {}).values()
    )


def _blocks(
    loaded: LoadedModel,
    layouts: list[WeightLayout],
    config: CompressionConfig,
    text: str | None,
    device: torch.device,
    hessian_cache: str | Path | None,
    progress: bool,
) -> tuple[StatedBlocks, tuple[str, ...]]:
    """The blocks with their Hessians, calibrated now or kept from an earlier run."""
    tokens, events = calibration_tokens(
        config.calibration,
        loaded.model,
        loaded.tokenizer,
        samples=config.samples,
        sequence_length=config.sequence_length,
        seed=config.seed,
        batch_size=config.batch_size,
        text=text,
        progress=progress,
    )

    def calibrate() -> CalibratedBlocks:
        return CalibratedBlocks(
            loaded.model,
            layouts,
            tokens,
            device=device,
            batch_size=config.batch_size,
            sequential=config.sequential,
            progress=progress,
        )

    if hessian_cache is None:
        return calibrate(), events
    if config.sequential:
        raise CalibrationError(
            "hessian_cache and sequential are both given: Hessians of quantized inputs belong to "
            "one setting only; drop one of them."
        )
    key = hessian_key(loaded.model, layouts, tokens, {})
    cache = HessianCache(hessian_cache, key)
    blocks = cached_blocks(loaded.model, layouts, cache, calibrate, device=device)
    if blocks.from_cache and progress:
        tqdm.write(f"Hessians found in {cache.path}: calibration is skipped.", file=sys.stderr)
    return blocks, events


def _write_companions(loaded: LoadedModel, folder: Path) -> None:
    """config.json with the quantization method, tokenizer, generation and licence files."""
    content = loaded.model.config.to_dict()
    content["quantization_config"] = {"quant_method": QUANT_METHOD, "format": FORMAT_VERSION}
    content["architectures"] = [type(loaded.model).__name__]
    text = json.dumps(content, indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if loaded.files is not None:
        patterns = (*COPIED_FILES, *LICENCE_PATTERNS)
        for file in sorted({found for p in patterns for found in loaded.files.glob(p)}):
            shutil.copyfile(file, folder / file.name)
        return
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    if loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(folder)


def _verify(folder: Path, parameters: Mapping[str, Tensor], progress: bool) -> None:
    """Every compressed weight decodes to the bits in memory."""
    for name, weight in open_directory(folder).weights(progress=progress):
        if name in parameters and not torch.equal(weight, parameters[name].detach().cpu()):
            raise CorruptionError(
                f"{name} does not decode to the weight that was quantized: "
                "this is a defect of cerwu_gpu; please report it."
            )
