"""A subject of a sweep that is one matrix: real quantizing, coding and files in milliseconds."""

from collections.abc import Mapping
from pathlib import Path

import torch

from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.sweep.points import Point
from cerwu_gpu.sweep.subject import Outcome, Quality


class OneMatrix:
    """Quality is the share of the output's energy that is kept.

    Attributes:
        ran: points in the order in which they were run.
        judged: how often the original was asked for.
    """

    quality: Quality = "accuracy"

    def __init__(self, seed: int = 0) -> None:
        self.name = "matrix"
        generator = torch.Generator().manual_seed(seed)
        self._weight = torch.randn(48, 24, generator=generator)
        inputs = torch.randn(24, 96, generator=generator)
        self._hessian = 2 / 96 * inputs @ inputs.T
        self._seed = seed
        self.ran: list[Point] = []
        self.judged = 0

    def identity(self) -> Mapping[str, str]:
        return {"weights": f"seed {self._seed}", "data": "random"}

    def original(self) -> float:
        self.judged += 1
        return 1.0

    def run(self, point: Point, folder: Path) -> Outcome:
        assert not folder.exists()
        self.ran.append(point)
        done = quantize_stack([self._weight], self._hessian, point.config)
        coded = encode_matrix(done.matrices[0], done.relative_losses[0])
        folder.mkdir()
        (folder / "words").write_bytes(coded.words.tobytes())
        (folder / "side").write_bytes(coded.side)
        size = 4 * len(coded.words) + len(coded.side)
        return Outcome(
            bits_per_weight=8 * size / self._weight.numel(),
            directory_bytes=size,
            original_bytes=4 * self._weight.numel(),
            quality=1 - done.relative_losses[0],
            seconds={"quantize": 0.25, "calibrate": 1.0 if len(self.ran) == 1 else 0.0},
            events=("it has\ntwo lines.", "and, a comma."),
        )
