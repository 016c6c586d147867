"""Adapter of any torch module, which runs whole on batches of inputs."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cerwu_gpu.calibration.cache import (
    HessianCache,
    cached_sensitivities,
    hessian_key,
    tensors_digest,
)
from cerwu_gpu.calibration.data_free import DataFreeBlocks
from cerwu_gpu.calibration.running import (
    Batch,
    Runner,
    evaluating,
    is_held_out,
    materialized,
    samples,
)
from cerwu_gpu.calibration.sensitivity import (
    Loss,
    losses,
    module_sensitivities,
    required_logits,
)
from cerwu_gpu.calibration.students import ModuleStudent
from cerwu_gpu.calibration.whole import HESSIAN_BYTES, CalibratedLayers
from cerwu_gpu.compression.adapter import Adapter
from cerwu_gpu.compression.blocks import Blocks
from cerwu_gpu.compression.distill import Student
from cerwu_gpu.config import Batches, CompressionConfig, MaxPerplexityIncrease
from cerwu_gpu.container.reader import CompressedDirectory
from cerwu_gpu.errors import CalibrationError, ConfigError, FormatError
from cerwu_gpu.files import dtype_name
from cerwu_gpu.models.norms import FollowingNorms, following_norms, norms_follow
from cerwu_gpu.models.selection import require_finite, require_values, select_in_module
from cerwu_gpu.quantize.sensitivity import Sensitivities

Module = TypeVar("Module", bound=nn.Module)


class ModuleAdapter(Adapter):
    """A module with linear layers and 2-D convolutions, and batches of its inputs.

    Batch norms follow the quantized weights (norms.py), depending on config.drift.

    Attributes:
        batches: the calibration inputs.
    """

    full_passes = 6

    def __init__(
        self,
        module: nn.Module,
        config: CompressionConfig,
        *,
        device: torch.device | None = None,
        hessian_cache: Path | None = None,
        work: Path | None = None,
        hessian_bytes: int = HESSIAN_BYTES,
        progress: bool = False,
    ) -> None:
        """Choose the weights; the module has its original ones.

        Args:
            config: with batches of calibration inputs (running.Batch), which are stored and run
                several times, and a loss, for the sensitivities and `loss`.
            device: of the work; None: the module's.
            hessian_cache: directory for Hessians and sensitivities, for later runs too.
            work: this run's directory (container/work.py), which keeps sensitivities for a resumed
                run.
            hessian_bytes: maximum bytes of Hessians per run over the batches.
            progress: show bars on stderr.

        Raises:
            CerwuError: a subclass that names the error.
        """
        super().__init__()
        given = config.calibration
        if not isinstance(given, Batches) and not config.data_free:
            raise ConfigError(f"{type(module).__name__} is calibrated by batches: give Batches.")
        loss = given.loss if isinstance(given, Batches) else None
        require_values(module)
        self.module = module
        self.select(config)
        require_finite(module, self.layouts)
        self.batches = materialized(given.inputs) if isinstance(given, Batches) else []
        self._held_out: list[Batch] = []
        if isinstance(config.target, MaxPerplexityIncrease):
            self.batches, self._held_out = _split(self.batches, loss)
        self._loss = loss
        home = module.get_parameter(next(iter(self.layouts))).device
        self._device = device or home
        self._work = work
        self._hessian_bytes = hessian_bytes
        self._progress = progress
        self._norms: FollowingNorms | None = None
        self.cache: HessianCache | None = None
        if hessian_cache is not None:
            if config.sequential:
                raise CalibrationError(
                    "sequential Hessians belong to one setting only and are not kept: drop "
                    "sequential, or the Hessian cache."
                )
            inputs = f"{config.seed} {_digest(self.batches)}"
            key = hessian_key(module, self._described(), list(self.layouts.values()), inputs)
            self.cache = HessianCache(hessian_cache, key)
        self._sensitivity_cache = HessianCache(work, "calibration") if work else None
        if self.cache is not None and loss is None:  # nothing identifies a loss from run to run
            self._sensitivity_cache = self.cache
        self._sensitivities: Sensitivities | None = None

    def select(self, config: CompressionConfig) -> None:
        if config.keep_head:
            raise ConfigError(
                "keep_head is for language models: exclude the last layer by its name."
            )
        selection = select_in_module(self.module, config.include, config.exclude)
        self.layouts = {layout.name: layout for layout in selection.chosen}
        self.left = selection.left
        self.events = selection.events(strict=config.strict)

    def _described(self) -> object:
        """Return what is known of the module beside its state, ready for JSON."""
        return repr(self.module)

    def sensitivities(self, config: CompressionConfig) -> Sensitivities:
        def compute() -> Sensitivities:
            alphas = module_sensitivities(
                self.module,
                tuple(self.layouts.values()),
                self.batches,
                loss=self._loss,
                device=self._device,
                seed=config.seed,
                progress=self._progress,
            )
            return Sensitivities(alphas)

        if self._sensitivities is None:
            self._sensitivities = cached_sensitivities(self._sensitivity_cache, compute)
        return self._sensitivities

    def blocks(self, config: CompressionConfig, *, sampling: bool = False) -> Blocks:
        if config.data_free:
            owners = dict.fromkeys(name.rpartition(".")[0] for name in self.layouts)
            parts = [(owner, self.module.get_submodule(owner)) for owner in owners]
            return DataFreeBlocks(self.module, self.layouts, parts, self._device)
        if self._norms is None:
            self._norms = following_norms(
                self.module, self.batches, config, device=self._device, progress=self._progress
            )
        layouts = list(self.layouts.values())
        layers = CalibratedLayers(
            self.module,
            layouts,
            self.batches,
            device=self._device,
            hessian_bytes=self._hessian_bytes,
            sequential=config.sequential,
            seed=config.seed,
            progress=self._progress,
        )
        if self.cache is None:
            return layers
        return self.cache.blocks(
            self.module,
            layouts,
            len(layers),
            lambda: layers,
            self._device,
            progress=self._progress,
        )

    def restore(self) -> None:
        super().restore()
        if self._norms is not None:
            self._norms.put_back()

    def finish(self, config: CompressionConfig) -> None:
        if self._norms is not None and norms_follow(config):
            self._norms.follow()

    def student(self, config: CompressionConfig) -> Student:
        """Return the module with what is tuned on the batches; held-out ones, or else a share of
        them, judge.

        Raises:
            ConfigError: there is only one batch.
        """
        batches, held_out = self.batches, self._held_out
        if not held_out:
            batches, held_out = _apart(batches, "distillation")
        return ModuleStudent(
            self.module,
            batches,
            held_out,
            required_logits,
            layouts=list(self.layouts.values()),
            device=self._device,
            folder=self._work,
        )

    @torch.no_grad()
    def loss(self) -> float | None:
        if not self._held_out or self._loss is None:
            return None
        total = count = 0.0
        with evaluating(self.module, self._device):
            runner = Runner(self.module, {}, self._device)
            for batch in self._held_out:
                total += float(losses(self._loss, runner.run(batch), batch).double().sum())
                count += samples(batch)
        return total / count

    def identity(self) -> dict[str, str]:
        return {
            "the model": hessian_key(self.module, self._described(), [], ""),
            "the calibration inputs": _digest([*self.batches, *self._held_out]),
            "loss": "none" if self._loss is None else _name(self._loss),
        }


def _split(batches: list[Batch], loss: Loss | None) -> tuple[list[Batch], list[Batch]]:
    """Return calibration batches and held-out ones.

    Raises:
        ConfigError: there is no loss.
        CalibrationError: there is only one batch.
    """
    if loss is None:
        raise ConfigError("max_perplexity_increase needs a loss: give one, or lmbda.")
    return _apart(batches, "max_perplexity_increase")


def _apart(batches: list[Batch], what: str) -> tuple[list[Batch], list[Batch]]:
    """Return batches to use and held-out ones.

    Raises:
        CalibrationError: there is only one batch.
    """
    if len(batches) < 2:
        raise CalibrationError(f"{what} needs at least 2 calibration batches: give more.")
    pairs = list(zip(batches, is_held_out(len(batches)), strict=True))
    return [batch for batch, out in pairs if not out], [batch for batch, out in pairs if out]


def _digest(batches: Iterable[Batch]) -> str:
    """Return the SHA-256 (hexadecimal) of batches: their tensors, with the places and names of
    these, and a description of everything else."""
    digest = hashlib.sha256()
    for batch in batches:
        for path, value in _leaves("", batch):
            if isinstance(value, Tensor):
                digest.update(f"{path} {tensors_digest([value])}".encode())
            else:
                digest.update(f"{path} {value!r}".encode())
    return digest.hexdigest()


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a nest of lists and mappings holds, with the way to it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}", item)
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _leaves(f"{path}[{number}]", item)
    else:
        yield path, value


def _name(function: object) -> str:
    """Return a name of a function that is the same in the next run."""
    module = getattr(function, "__module__", "")
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


@torch.no_grad()
def fill(
    module: Module,
    directory: CompressedDirectory,
    *,
    device: torch.device,
    carried: Collection[str] = (),
    verify: bool = True,
    progress: bool = False,
) -> Module:
    """Copy all stored tensors into `module`, after checking that all of them fit.

    Args:
        device: of the decoding; the module stays on its own.
        carried: names of stored tensors that a module of this kind does not load; those that this
            one has are copied, too.

    Returns:
        The module.

    Raises:
        FormatError: names, shapes or dtypes of the file and the module differ, or the file is
            damaged.
    """
    target: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    kind = type(module).__name__
    left = set(carried) - set(target)
    described = {name: entry for name, entry in directory.described().items() if name not in left}
    check_names(directory.path, target, {n: shape for n, (_, shape) in described.items()}, kind)
    for name, (dtype, _) in described.items():
        if dtype != dtype_name(target[name].dtype):
            raise FormatError(
                f"{directory.path} has {name} as {dtype}, {kind} as "
                f"{dtype_name(target[name].dtype)}: give the module it is of."
            )
    plain = directory.plain(verify=verify)
    state = {name: tensor for name, tensor in plain if name not in left}
    state |= dict(directory.weights(device=device, verify=verify, progress=progress))
    for name, tensor in state.items():
        target[name].copy_(tensor)
    return module


def check_names(
    path: Path, target: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]], kind: str
) -> None:
    """Refuse stored tensors that are not those of a module (`state_difference`).

    Args:
        path: of the directory.

    Raises:
        FormatError: the first difference.
    """
    difference = state_difference(target, stored, kind)
    if difference is not None:
        raise FormatError(f"{path}: {difference}: give the module it is of.")


def state_difference(
    target: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]], kind: str
) -> str | None:
    """Return how stored tensors differ from those of a module by name or shape; None: they do not.

    Args:
        target: the module's tensors; one of several names of a shared tensor must be stored.
        stored: name -> shape.
        kind: of the module, in the sentence.
    """
    for name in stored:
        if name not in target:
            return f"it has {name}, which {kind} lacks"
    filled = {id(target[name]) for name in stored}
    for name, tensor in target.items():
        if id(tensor) not in filled:
            return f"it lacks {name} of {kind}"
        if name in stored and tuple(tensor.shape) != stored[name]:
            return f"it has {name} as {list(stored[name])}, {kind} as {list(tensor.shape)}"
    return None
