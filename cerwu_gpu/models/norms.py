r"""Batch norms that follow the compressed layers in front of them.

A batch norm in eval mode subtracts a stored mean mu and divides by a stored deviation sigma, those
of the original network. Quantized weights give its input another mean and variance, and what is
coded at few bits has too little of the latter: rate-distortion theory shrinks it. With m and v the
mean and variance of a channel of the input in the original network over the calibration batches,
and m', v' those in the compressed one, the statistics

    sigma'^2 = sigma^2 v' / v,    mu' = m' - (m - mu) sigma' / sigma

give the channel the mean and variance behind the norm that it had. Not m' and v' themselves: mu and
sigma are of the whole training set, and only the change is taken from the calibration batches. The
statistics are stored anyway, so this costs no bits, and weights that did not change move nothing.

Norms see inputs that have passed the norms before them; within a batch each one is corrected by the
moments of that batch before it is applied, so one run corrects a network of any depth.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cerwu_gpu.calibration.running import Batch, Runner, evaluating
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.progress import tracked

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

GAIN_LIMIT = 16.0
"""Largest factor of a variance either way: quantization may erase most of a channel."""


@dataclass(frozen=True)
class _Moments:
    """Mean [c] and biased variance [c] of each channel over `count` values, float64 on the CPU."""

    count: int
    mean: Tensor
    variance: Tensor

    @staticmethod
    def of(x: Tensor) -> "_Moments":
        """Return the moments of a norm's input [samples, c, ...]."""
        flat = x.detach().to(torch.float32).transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(flat, dim=1, correction=0)
        return _Moments(flat.shape[1], mean.cpu().double(), variance.cpu().double())

    @staticmethod
    def joined(parts: Sequence["_Moments"]) -> "_Moments":
        """Return the moments over the values of all parts."""
        count = sum(part.count for part in parts)
        mean = torch.stack([part.mean * part.count for part in parts]).sum(0) / count
        squares = torch.stack([(p.variance + p.mean.square()) * p.count for p in parts]).sum(0)
        return _Moments(count, mean, (squares / count - mean.square()).clamp_min(0))


@dataclass(frozen=True)
class _Norm:
    """A batch norm, its stored statistics, and its input's moments in the original, by batch."""

    module: BatchNorm
    mean: Tensor
    variance: Tensor
    seen: list[_Moments]

    def set(self, was: _Moments, now: _Moments) -> None:
        """Set the statistics for an input whose moments changed from `was` to `now`."""
        usable = (was.variance > 0) & (now.variance > 0)
        gain = torch.where(usable, now.variance / was.variance.where(usable, 1.0), 1.0)
        gain = gain.clamp(1 / GAIN_LIMIT, GAIN_LIMIT)
        mean = now.mean - (was.mean - self.mean.double()) * gain.sqrt()
        self._fill(mean, self.variance.double() * gain)

    def put_back(self) -> None:
        self._fill(self.mean, self.variance)

    @torch.no_grad()
    def _fill(self, mean: Tensor, variance: Tensor) -> None:
        assert self.module.running_mean is not None and self.module.running_var is not None
        self.module.running_mean.copy_(mean)
        self.module.running_var.copy_(variance)


class FollowingNorms:
    """The batch norms of a module, corrected to keep their channels' means and variances.

    Only norms that have stored statistics and are used once in every run are corrected.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Batch],
        *,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> None:
        """Run the module with its original weights to measure its norms' inputs.

        Args:
            module: run in eval mode; it is on `device` while it runs.
            batches: the inputs of the whole module (running.materialized).

        Raises:
            CalibrationError: the module does not take the batches.
        """
        self._module = module
        self._batches = batches
        self._device = torch.device(device)
        self._progress = progress
        norms = [
            _Norm(child, child.running_mean.cpu().clone(), child.running_var.cpu().clone(), [])
            for child in module.modules()
            if isinstance(child, BatchNorm)
            and child.running_mean is not None
            and child.running_var is not None
        ]
        if norms:
            self._run(norms, lambda norm, _, moments: norm.seen.append(moments))
        self._norms = [norm for norm in norms if len(norm.seen) == len(batches)]

    def __len__(self) -> int:
        return len(self._norms)

    def put_back(self) -> None:
        """Restore the original statistics of all norms."""
        for norm in self._norms:
            norm.put_back()

    def follow(self) -> None:
        """Set the statistics of all norms for the module's current weights.

        Raises:
            CalibrationError: the module does not take the batches.
        """
        moments: dict[nn.Module, list[_Moments]] = {norm.module: [] for norm in self._norms}

        def correct(norm: _Norm, index: int, now: _Moments) -> None:
            norm.set(norm.seen[index], now)
            moments[norm.module].append(now)

        if self._norms:
            self._run(self._norms, correct)
        for norm in self._norms:
            norm.set(_Moments.joined(norm.seen), _Moments.joined(moments[norm.module]))

    def _run(self, norms: Sequence[_Norm], note: Callable[[_Norm, int, _Moments], None]) -> None:
        """Run all batches; call `note` with norm, batch and moments before a norm is applied."""
        with evaluating(self._module, self._device), torch.no_grad():
            runner = Runner(self._module, {}, self._device)
            bar = tracked(
                self._batches, what="batch norms", unit="batch", shown=self._progress, leave=False
            )
            for index, batch in enumerate(bar):
                with _watching(norms, index, note):
                    runner.run(batch)


@contextmanager
def _watching(
    norms: Sequence[_Norm], index: int, note: Callable[[_Norm, int, _Moments], None]
) -> Iterator[None]:
    """Call `note` before each norm is applied, inside the context."""

    def before(norm: _Norm) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: note(norm, index, _Moments.of(inputs[0]))

    handles = [norm.module.register_forward_pre_hook(before(norm)) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def norms_follow(config: CompressionConfig) -> bool:
    """Return whether batch norms follow the weights; auto: for grids that follow from lmbda."""
    return config.drift == "correct" or (config.drift == "auto" and not config.bounded)


def following_norms(
    module: nn.Module,
    batches: Sequence[Batch],
    config: CompressionConfig,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> FollowingNorms | None:
    """Return the norms of a module with its original weights; None where they are not to follow.

    Raises:
        ConfigError: the settings ask for it, and there is no norm.
        CalibrationError: the module does not take the batches.
    """
    if not norms_follow(config):
        return None
    norms = FollowingNorms(module, batches, device=device, progress=progress)
    if config.drift == "correct" and not len(norms):
        raise ConfigError(
            "drift correct has a module's batch norms follow its weights, and this one has none "
            "with stored statistics: take sequential."
        )
    return norms
