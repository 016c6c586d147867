"""One full pass over a plain module: all weights quantized, coded, stored, not yet published."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from cerwu_gpu import __version__
from cerwu_gpu.attempt import Attempt, check_stored, directory_bytes, plain_tensors
from cerwu_gpu.blocks import Blocks
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.pipeline import compress_blocks
from cerwu_gpu.progress import Clock
from cerwu_gpu.vision.norms import FollowingNorms


def nothing_more(_: Path) -> None:
    """A plain module has no files of its own."""


@dataclass(frozen=True)
class Writing:
    """How a module is quantized, coded and stored, as often as it takes.

    Leaving the context removes what was not published.
    """

    module: nn.Module
    layouts: Mapping[str, WeightLayout]
    output: Path
    overwrite: bool
    verify: bool
    companions: Callable[[Path], None]
    clock: Clock
    norms: FollowingNorms | None = None
    """Batch norms that are to follow the quantized weights."""
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def attempt(
        self,
        blocks: Blocks,
        gradients: Mapping[tuple[str, int], Tensor],
        config: CompressionConfig,
    ) -> Attempt:
        """One full pass over the weights as they are; an earlier attempt is removed.

        Raises:
            CerwuError: a subclass that says what is wrong.
        """
        generator = f"cerwu_gpu {__version__}"
        self._stack.close()
        if self.norms is not None:
            self.norms.put_back()
        writer = self._stack.enter_context(
            DirectoryWriter(self.output, generator=generator, overwrite=self.overwrite)
        )
        parameters = {name: self.module.get_parameter(name) for name in self.layouts}
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        layers = compress_blocks(
            blocks, self.layouts, dtypes, writer, config, self.clock, gradients
        )
        if self.norms is not None:
            with self.clock.stage("quantize"):
                self.norms.follow()
        with self.clock.stage("write"):
            for name, tensor in plain_tensors(self.module, self.layouts).items():
                writer.add_plain(name, tensor)
            self.companions(writer.folder)
            writer.complete()
        if self.verify:
            with self.clock.stage("verify"):
                check_stored(writer.folder, parameters)
        return Attempt(config.lmbda, tuple(layers), directory_bytes(writer.folder), writer)
