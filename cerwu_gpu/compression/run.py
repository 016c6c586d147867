"""Full passes over a model: all weights quantized, coded and stored, not yet published."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from cerwu_gpu import __version__
from cerwu_gpu.compression.adapter import Adapter
from cerwu_gpu.compression.distill import Distilled, distil
from cerwu_gpu.compression.pipeline import compress_blocks
from cerwu_gpu.compression.row_codes import WrittenRowCodes
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.journal import Journal
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import ConfigError, CorruptionError
from cerwu_gpu.files import written
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.progress import Clock
from cerwu_gpu.quantize.sensitivity import Sensitivities
from cerwu_gpu.report import LayerReport, Report

DISTILLATION_FILE = "distillation.safetensors"
"""Name of the state of an unfinished distillation in the work directory."""


@dataclass(frozen=True)
class Attempt:
    """The result of one pass: a complete directory under its hidden name.

    Attributes:
        lmbda: trade-off of the pass.
        layers: report of each matrix.
        directory_bytes: of all its files.
        writer: holds it.
        distilled: gain of the distillation, where there was one.
    """

    lmbda: float
    layers: tuple[LayerReport, ...]
    directory_bytes: int
    writer: DirectoryWriter
    distilled: Distilled | None = None

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def coded_bytes(self) -> int:
        """Number of bytes stored for them."""
        return sum(layer.words_bytes + layer.side_bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Number of bits stored per quantized weight."""
        return 8 * self.coded_bytes / self.weights

    def events(self, layouts: Mapping[str, WeightLayout]) -> tuple[str, ...]:
        """Return what did not go as planned, by matrix."""
        return tuple(
            f"{layouts[layer.name].key(layer.part)}: {event}"
            for layer in self.layers
            for event in layer.events
        )


class Run:
    """Passes for one output; leaving the context removes those that were not published.

    Attributes:
        adapter: the model and its data.
        output: path of the directory.
        clock: collects the seconds of all stages.
    """

    def __init__(
        self,
        adapter: Adapter,
        output: Path,
        *,
        clock: Clock,
        overwrite: bool = False,
        verify: bool = True,
        work: Path | None = None,
        check: Callable[[Path], None] | None = None,
        progress: bool = False,
    ) -> None:
        """Take the settings; nothing is written yet.

        Args:
            overwrite: replace a compressed directory at `output`.
            verify: decode the written files and compare them with the weights in memory.
            work: this run's directory (container/work.py) for finished blocks; None: they are not
                stored.
            check: opens a complete directory as its users will, and raises what they would see.
            progress: show bars on stderr.
        """
        self.adapter = adapter
        self.output = output
        self.clock = clock
        self._overwrite = overwrite
        self._verify = verify
        self._work = work
        self._check = check
        self._progress = progress
        self._stack = ExitStack()
        self._sensitivities: Sensitivities | None = None
        self._original_loss: float | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def sensitivities(self, config: CompressionConfig) -> Sensitivities:
        """Return the sensitivities, computed once."""
        if self._sensitivities is None:
            if not config.needs_gradients:
                return Sensitivities()
            with self.clock.stage("sensitivity"):
                self._sensitivities = self.adapter.sensitivities(config)
        return self._sensitivities

    def attempt(self, config: CompressionConfig, *, room: int | None = None) -> Attempt:
        """Quantize the whole model from its original weights, which are restored first.

        Args:
            room: most bytes by which a distillation may enlarge the directory.

        Raises:
            CerwuError: a subclass that names the error.
        """
        adapter, layouts, clock = self.adapter, self.adapter.layouts, self.clock
        self._stack.close()  # removes an earlier attempt
        adapter.restore()
        sensitivities = self.sensitivities(config)
        if adapter.card is not None and self._original_loss is None:
            self._original_loss = self._loss()
        student = None
        if config.distillation is not None:
            with clock.stage("distill"):
                student = adapter.student(config)
        writer = self._stack.enter_context(
            DirectoryWriter(
                self.output,
                generator=f"cerwu_gpu {__version__}",
                overwrite=self._overwrite,
                inside=self._work,
            )
        )
        dtypes = {name: adapter.module.get_parameter(name).dtype for name in layouts}
        work = self._work / f"lmbda-{config.lmbda!r}" if self._work else None
        journal = Journal(work) if work else None
        with clock.stage("calibrate"):
            blocks = adapter.blocks(config)
        layers = compress_blocks(
            blocks, layouts, dtypes, writer, config, clock, sensitivities, journal, adapter.ranks
        )
        adapter.quantized(journal)
        with clock.stage("quantize"):
            adapter.finish(config)
        distilled = None
        if student is not None and config.distillation is not None:
            with clock.stage("distill"):
                rows = WrittenRowCodes(writer, adapter.module)
                distilled = distil(
                    student,
                    rows,
                    config.distillation,
                    seed=config.seed,
                    room=room,
                    state=work / DISTILLATION_FILE if work else None,
                    progress=self._progress,
                )
                layers = rows.reports(layers)
        loss = None if adapter.card is None else self._loss()
        with clock.stage("write"):
            for name, tensor in plain_tensors(adapter.module, layouts).items():
                writer.add_plain(name, adapter.value(name, tensor))
            for name, tensor in adapter.carried.items():
                writer.add_plain(name, tensor)
            writer.complete()
            adapter.write_files(writer.folder)
            if self._check is not None:
                self._check(writer.folder)
            if adapter.card is not None:
                with written(writer.folder):
                    adapter.card(writer.folder, self._original_loss, loss)
        if self._verify:
            with clock.stage("verify"):
                check_stored(writer.folder, layouts, adapter.holds, progress=self._progress)
        size = directory_bytes(writer.folder)
        return Attempt(config.lmbda, tuple(layers), size, writer, distilled)

    def report(self, attempt: Attempt, original_bytes: int) -> Report:
        """Return the report of an attempt."""
        adapter = self.adapter
        return Report(
            layers=attempt.layers,
            lmbda=attempt.lmbda,
            bits_per_weight=attempt.bits_per_weight,
            directory_bytes=attempt.directory_bytes,
            original_bytes=original_bytes,
            seconds=self.clock.seconds,
            events=(*adapter.events, *attempt.events(adapter.layouts)),
            left=dict(adapter.left),
            distillation=None if attempt.distilled is None else asdict(attempt.distilled),
        )

    def _loss(self) -> float | None:
        with self.clock.stage("evaluate"):
            return self.adapter.loss()


def take_part(adapter: Adapter, config: CompressionConfig, clock: Clock) -> None:
    """Do the part of a rank that writes nothing in the pass of `Run.attempt` on rank 0.

    Raises:
        CerwuError: a subclass that names the error.
    """
    layouts = adapter.layouts
    sensitivities = adapter.sensitivities(config) if config.needs_gradients else None
    dtypes = {name: adapter.module.get_parameter(name).dtype for name in layouts}
    blocks = adapter.blocks(config)
    compress_blocks(
        blocks, layouts, dtypes, None, config, clock, sensitivities, ranks=adapter.ranks
    )


def plain_tensors(module: nn.Module, layouts: Mapping[str, WeightLayout]) -> dict[str, Tensor]:
    """Return the uncompressed entries of the state dict, tied and shared ones once.

    Raises:
        ConfigError: an entry of the state dict is no tensor.
    """
    compressed = {id(module.get_parameter(name)) for name in layouts}
    seen: set[int] = set()
    plain = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{name} in the module's state is no tensor and cannot be stored.")
        if id(tensor) not in seen and id(tensor) not in compressed:
            plain[name] = tensor
        seen.add(id(tensor))
    return plain


def plain_bytes(module: nn.Module, layouts: Mapping[str, WeightLayout]) -> int:
    """Return the bytes of the uncompressed tensors; without layouts, of the whole module."""
    return tensors_bytes(plain_tensors(module, layouts).values())


def tensors_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def directory_bytes(path: Path) -> int:
    """Return the bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def check_stored(
    folder: Path,
    names: Iterable[str],
    holds: Callable[[str, Tensor], bool],
    *,
    progress: bool = False,
) -> None:
    """Check the checksums of plain tensors, and compare decoded weights with those of the model.

    Args:
        names: of the compressed parameters.
        holds: returns whether the model's parameter of a name has this value, bit for bit.

    Raises:
        CorruptionError: a tensor differs.
    """
    directory = open_directory(folder)
    for _ in directory.plain():
        pass
    missing = set(names) - directory.compressed().keys()
    if missing:
        raise CorruptionError(f"{min(missing)} was not written: please report it.")
    for name, weight in directory.weights(progress=progress):
        if not holds(name, weight):
            raise CorruptionError(
                f"{name} does not decode to the weight that was quantized: "
                "this is a defect of cerwu_gpu; please report it."
            )
