"""What a compression starts from: the model, its calibration tokens and the Hessians they give."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cerwu_gpu.blocks import Blocks
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.hf.calibration import CalibratedBlocks
from cerwu_gpu.hf.head import BlocksWithLookups
from cerwu_gpu.hf.hessian_cache import HessianCache, StatedBlocks, cached_blocks, hessian_key
from cerwu_gpu.hf.inputs import Label
from cerwu_gpu.hf.models import LoadedModel, check_weights
from cerwu_gpu.hf.sensitivity import output_sensitivities
from cerwu_gpu.hf.text import calibration_tokens
from cerwu_gpu.layout import WeightLayout

SENSITIVITY_TOKENS = 4096
"""So many tokens tell the sensitivities: they are means over outputs that differ by decades."""
HELD_OUT = 8
"""One calibration sample in so many is kept to judge a max_perplexity_increase by."""
JUDGING_TOKENS = 8192
"""So many tokens that did not calibrate tell the perplexity for a model card."""


@dataclass(frozen=True)
class Source:
    """A model ready to be compressed, as often as it takes.

    Attributes:
        loaded: the model and its tokenizer.
        layouts: of the weights to compress, by name.
        tokens: int64 [samples, sequence], what calibrates.
        held_out: int64 [some, sequence], disjoint from `tokens`, to judge the outcome by; empty
            where nobody asks or the text has no more.
        events: what did not go as planned.
        cache: Hessians and sensitivities, for later runs too.
        kept: sensitivities where there is no cache, for this run only.
    """

    loaded: LoadedModel
    layouts: dict[str, WeightLayout]
    tokens: Tensor
    held_out: Tensor
    events: tuple[str, ...]
    config: CompressionConfig
    device: torch.device
    cache: HessianCache | None
    progress: bool
    kept: HessianCache | None = None

    @staticmethod
    def prepare(
        loaded: LoadedModel,
        layouts: tuple[WeightLayout, ...],
        config: CompressionConfig,
        *,
        text: str | None,
        device: torch.device,
        hessian_cache: str | Path | None,
        progress: bool,
        work: Path | None = None,
        judged: bool = False,
    ) -> "Source":
        """Tokenize the calibration text and find the place of its Hessians.

        `judged` says that some text is held out to judge the outcome by, beside what calibrates.
        `work` is a directory that belongs to this run alone (container/work.py): what a run that
        dies would have to find out again goes there.

        Raises:
            CalibrationError: the text cannot be used, or the settings contradict each other.
            ModelError: a weight to compress is NaN or infinite.
        """
        check_weights(loaded.model, [layout.name for layout in layouts])
        # Where an increase is asked for, some of what calibrates is held out anyway.
        apart = judged and config.max_perplexity_increase is None
        tokens, held_out, events = calibration_tokens(
            config.calibration,
            loaded.model,
            loaded.tokenizer,
            samples=config.samples,
            sequence_length=config.sequence_length,
            seed=config.seed,
            batch_size=config.batch_size,
            unseen=-(-JUDGING_TOKENS // config.sequence_length) if apart else 0,
            text=text,
            progress=progress,
        )
        if apart and not len(held_out):
            events = (
                *events,
                "no calibration text is left to judge by: the card has no perplexity.",
            )
        if config.strict and events:
            raise CalibrationError(f"{events[0]} (strict)")
        if config.max_perplexity_increase is not None:
            tokens, held_out = _split(tokens)
        cache = None
        if config.correct_drift and hessian_cache is not None and not config.targeted:
            raise CalibrationError(
                "Hessians behind compressed blocks belong to one setting only and are not kept: "
                "drop correct_drift or the Hessian cache."
            )
        if hessian_cache is not None:
            if config.sequential:
                raise CalibrationError(
                    "sequential Hessians belong to one setting only and are not kept: drop "
                    "sequential, or the Hessian cache and any target."
                )
            key = hessian_key(loaded.model, list(layouts), tokens, {})
            cache = HessianCache(hessian_cache, key)
        by_name = {layout.name: layout for layout in layouts}
        kept = cache if work is None else cache or HessianCache(work, "calibration")
        return Source(
            loaded, by_name, tokens, held_out, events, config, device, cache, progress, kept
        )

    def blocks(self, gradients: Mapping[Label, Tensor]) -> Blocks:
        """The model's blocks with their Hessians, calibrated now or kept from before.

        What `gradients` says about looked-up embeddings joins their Hessians (hf/head.py).
        """
        live = self.cache is None or self.config.correct_drift
        return BlocksWithLookups(self._calibrate() if live else self._kept_blocks(), gradients)

    def sample_blocks(self, gradients: Mapping[Label, Tensor]) -> Blocks:
        """The same for a look at the model that quantizes nothing: original inputs will do."""
        return BlocksWithLookups(self._kept_blocks(), gradients)

    def calibrate(self) -> None:
        """Have all Hessians in the cache, from now or from before; the model stays as it is."""
        blocks = self._kept_blocks()
        if not blocks.from_cache:
            for block in blocks:
                block.statistics()

    def _kept_blocks(self) -> StatedBlocks:
        assert self.cache is not None
        blocks = cached_blocks(
            self.loaded.model,
            list(self.layouts.values()),
            self.cache,
            partial(self._calibrate, sampling=True),
            device=self.device,
        )
        if blocks.from_cache and self.progress:
            where = f"Hessians found in {self.cache.path}: calibration is skipped."
            tqdm.write(where, file=sys.stderr)
        return blocks

    def _calibrate(self, sampling: bool = False) -> CalibratedBlocks:
        return CalibratedBlocks(
            self.loaded.model,
            list(self.layouts.values()),
            self.tokens,
            device=self.device,
            batch_size=self.config.batch_size,
            sequential=self.config.sequential,
            correct_drift=bool(self.config.correct_drift) and not sampling,
            progress=self.progress,
        )

    def gradients(self) -> Mapping[Label, Tensor]:
        """(name, part) -> mean squared gradient [m] at every output, where the settings use it."""
        if not self.config.needs_gradients:
            return {}
        kept = self.kept.read_sensitivities() if self.kept is not None else None
        if kept is not None:
            return _filled(kept)
        found = output_sensitivities(
            self.loaded.model,
            list(self.layouts.values()),
            self.tokens[: -(-SENSITIVITY_TOKENS // self.tokens.shape[1])],
            device=self.device,
            batch_size=self.config.batch_size,
            progress=self.progress,
        )
        if self.kept is not None:
            self.kept.write_sensitivities(found)
        return _filled(found)


def _filled(gradients: dict[Label, Tensor]) -> dict[Label, Tensor]:
    """Experts that no token reached count like the average of their fellows."""
    filled = dict(gradients)
    for (name, part), found in gradients.items():
        if part >= 0 and not bool(found.any()):
            fellows = [
                value.mean()
                for (other, number), value in gradients.items()
                if other == name and number >= 0 and bool(value.any())
            ]
            if fellows:
                filled[name, part] = torch.stack(fellows).mean().expand_as(found)
    return filled


def _split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Calibration and held-out samples: every HELD_OUT-th one is held out.

    Raises:
        CalibrationError: there is only one sample.
    """
    if len(tokens) < 2:
        raise CalibrationError(
            "max_perplexity_increase needs at least 2 calibration samples: give more text."
        )
    out = torch.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1
    out[-1] |= not bool(out.any())
    return tokens[~out], tokens[out]
