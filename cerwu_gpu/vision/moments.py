"""Which weights share an input, and the second moments of inputs, seen while a module runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu import backend
from cerwu_gpu.blocks import InputStatistics
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.vision.products import Product, input_rows, positions
from cerwu_gpu.vision.running import Batch, Runner, samples

ROWS = 1 << 17
"""About so many inputs of a weight are taken. Where all samples have more, each one gives as many
positions as it takes, drawn at random: neighbouring patches are much alike."""


@dataclass(frozen=True)
class Trace:
    """How a module uses its weights.

    Attributes:
        leader: parameter name -> the weight that is used first on the very same inputs, every
            time; q, k and v of an attention have one leader. In the order of their first use.
    """

    leader: dict[str, str]

    @property
    def leaders(self) -> list[str]:
        """One weight per distinct input, as called."""
        return list(dict.fromkeys(self.leader.values()))

    @property
    def shared(self) -> set[str]:
        """Leaders whose inputs other weights see, too."""
        return {leader for name, leader in self.leader.items() if name != leader}


@torch.no_grad()
def trace(runner: Runner, batch: Batch) -> Trace:
    """Run one batch and note which weights are applied to the same tensors in the same way."""
    products: list[Product] = []  # keeps every input alive, so that no identity occurs twice
    runner.run(batch, products.append)
    uses: dict[str, list[object]] = {}
    for product in products:
        uses.setdefault(product.name, []).append(product.identity)
    first: dict[tuple[object, ...], str] = {}
    return Trace({name: first.setdefault(tuple(own), name) for name, own in uses.items()})


class Moments:
    """Sums of x x^T of some distinct inputs, [groups, n, n] float64 each."""

    def __init__(
        self,
        layouts: Sequence[WeightLayout],
        traced: Trace,
        leaders: Iterable[str],
        *,
        expected: int,
        seed: int,
    ) -> None:
        """`expected`: how many samples there will be, in all batches together."""
        self._layouts = {layout.name: layout for layout in layouts}
        self._trace = traced
        self._leaders = frozenset(leaders)
        self._seed = seed
        self._most = -(-ROWS // expected)
        self._sums: dict[str, Tensor] = {}
        self._samples = 0
        self._batches = 0
        self._products = 0
        self._uses: dict[str, int] = {}
        self._open: dict[str, list[Product]] = {}

    @torch.no_grad()
    def add(self, runner: Runner, batch: Batch) -> None:
        """Run one batch.

        Raises:
            CalibrationError: an input is not finite, or weights share an input only sometimes.
        """
        self._products = 0
        self._uses.clear()
        runner.run(batch, self._note)
        self._open.clear()
        self._batches += 1
        self._samples += samples(batch)

    def _note(self, product: Product) -> None:
        self._products += 1
        leader = self._trace.leader.get(product.name)
        if leader is None:
            raise CalibrationError(f"{product.name} is used for some batches only: exclude it.")
        number = self._uses.get(product.name, 0)
        self._uses[product.name] = number + 1
        if leader in self._trace.shared:
            seen = self._open.setdefault(leader, [])
            if product.name == leader:
                seen.append(product)
            elif number >= len(seen) or seen[number].identity != product.identity:
                raise CalibrationError(
                    f"{product.name} shares its input with {leader} in some runs only: exclude it."
                )
        if product.name == leader and leader in self._leaders:
            self._accumulate(leader, product)

    def _accumulate(self, name: str, product: Product) -> None:
        layout, count = self._layouts[name], positions(product)
        kept = self._positions(count, product.x.device)
        scale = 1.0 if kept is None else count / len(kept)
        if name not in self._sums:
            n = layout.matrix_shape[1]
            self._sums[name] = torch.zeros(
                layout.parts, n, n, dtype=torch.float64, device=product.x.device
            )
        before = self._sums[name]
        own = before if kept is None else torch.zeros_like(before)
        for rows in input_rows(product, kept):
            if len(rows) == 1:
                backend.accumulate_hessian(own[0], rows[0])
            else:
                own += torch.bmm(rows.mT, rows)
        if kept is not None:
            before.add_(own, alpha=scale)
        if not bool(torch.isfinite(before.diagonal(dim1=1, dim2=2)).all()):
            raise CalibrationError(
                f"the input of {name} is not finite in float32 in calibration batch "
                f"{self._batches}: check the inputs and the weights."
            )

    def _positions(self, count: int, device: torch.device) -> Tensor | None:
        """Some of `count`, ascending, told by the seed, the batch and the product's number."""
        if count <= self._most:
            return None
        generator = torch.Generator().manual_seed(
            (self._seed * 1_000_003 + self._batches * 100_003 + self._products) % 2**63
        )
        chosen = torch.randperm(count, generator=generator)[: self._most]
        return chosen.sort().values.to(device)

    def statistics(self) -> dict[str, InputStatistics]:
        """Key -> statistics of that input; the sums are given up.

        A token is a sample: H = (2/p) sum of x x^T over all positions of p samples. The mean
        squared error of a layer is then that of a whole image, and layers compare.
        """
        result = {}
        for name in list(self._sums):
            sums = self._sums.pop(name)
            for part, moment in enumerate(sums):
                hessian = (moment + moment.T) / self._samples
                key = self._layouts[name].key(part)
                result[key] = InputStatistics(hessian.float(), self._samples)
        return result


def hessian_bytes(layout: WeightLayout) -> int:
    """What the statistics of a weight's input take: the sum in float64, H in float32."""
    return 12 * layout.parts * layout.matrix_shape[1] ** 2


def lots(
    layouts: Mapping[str, WeightLayout], traced: Trace, budget: int, *, single: bool
) -> list[list[str]]:
    """The leaders in the order of their first use, cut so that their Hessians fit `budget` bytes.

    A Hessian that is larger than that is a lot of its own; with `single` every one is.
    """
    found: list[list[str]] = []
    room = 0
    for leader in traced.leaders:
        size = hessian_bytes(layouts[leader])
        if not found or single or size > room:
            found.append([])
            room = budget
        found[-1].append(leader)
        room -= size
    return found
