"""Second moments of inputs, and the weights that share an input, watched while a module runs.

`InputMoments` is for blocks that run one by one, `ModuleMoments` for a module that runs whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cerwu_gpu import backend
from cerwu_gpu.calibration.products import Product, input_rows, positions
from cerwu_gpu.calibration.running import Batch, Runner, samples
from cerwu_gpu.calibration.shards import ShardSums
from cerwu_gpu.compression.blocks import InputStatistics, search_cost
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.layout import Label, WeightLayout
from cerwu_gpu.ranks import Ranks, greedy_owners

ROWS = 1 << 17
"""Approximate number of inputs of a weight that are used. Where all samples have more, each gives
an equal number of positions, drawn at random: neighbouring patches are much alike."""


class _AllSeen(Exception):
    """Early end of a run whose outputs nobody needs."""


class InputMoments:
    """Sums of x x^T per distinct input of a block that runs by itself, in float64.

    Two matrices share an input when the model hands the same tensor object to both; the input is
    named after the matrix that sees it first.

    Attributes:
        keys: matrix -> name of its input, for the matrices seen so far.
    """

    def __init__(self, layouts: Sequence[WeightLayout], ranks: Ranks | None = None) -> None:
        self.keys: dict[Label, str] = {}
        self._layouts = tuple(layouts)
        self._by_name = {layout.name: layout for layout in layouts}
        self._ranks = ranks or Ranks()
        self._sums: ShardSums[str] = ShardSums(self._ranks)
        self._tokens: dict[str, int] = {}
        self._seen: dict[tuple[int, int], tuple[Tensor, str]] = {}
        self._samples = range(0)
        self._recording = self._ends_early = False
        self._recorded: dict[str, Tensor] = {}
        self._due: dict[str, int] = {}  # number of uses of each input that are still to come
        self._crosses: ShardSums[str] = ShardSums(self._ranks)

    def begin(self, shard: int) -> None:
        """Take what follows for a shard of the calibration batches; they come in order."""
        self._sums.begin(shard)
        self._crosses.begin(shard)

    @contextmanager
    def record(self, samples: range) -> Iterator[None]:
        """Watch one run on the original model's inputs; the `forward` that follows then also sums
        x x_hat^T, x of this run and x_hat of its own.

        The experts of a mixture are left out, since the two runs may route tokens differently.
        """
        self._recorded.clear()
        self._due.clear()
        self._recording = True
        try:
            with self.forward(samples):
                yield
        finally:
            self._recording = False

    @contextmanager
    def forward(self, samples: range) -> Iterator[None]:
        """Watch one run of the block over the calibration samples with these numbers.

        After `record` the run ends early, when all recorded inputs have been seen again.
        """
        self._samples = samples
        # Experts were not recorded: all of them may still be to come.
        recorded = self._due and all(layout.parts == 1 for layout in self._layouts)
        self._ends_early = bool(recorded and not self._recording)
        try:
            yield
        except _AllSeen:
            pass
        finally:
            self._ends_early = False
            self._seen.clear()

    def add(self, product: Product) -> None:
        """Add one application of a matrix to x [..., n].

        Raises:
            CalibrationError: x is not finite, or two matrices share their input only sometimes.
        """
        x, label, layout = product.x, (product.name, product.part), self._by_name[product.name]
        matrix = layout.key(product.part)
        # `_version` detects a change in place; a reference to x keeps its id from being reused.
        key = self._seen.setdefault((id(x), x._version), (x, matrix))[1]
        if self.keys.setdefault(label, key) != key:
            if not bool(x.any()):
                return  # zeros, as Zaya puts before the first token, add nothing to a Hessian
            raise self._sometimes(matrix, self.keys[label])
        if key == matrix and not (self._recording and layout.parts > 1):
            self._accumulate(key, x)
            if self._ends_early:
                self._due[key] -= 1
                if not any(self._due.values()):
                    raise _AllSeen

    def _accumulate(self, key: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self._recording:
            self._recorded[key] = rows
            self._due[key] = self._due.get(key, 0) + 1
            return
        total = self._sums.buffer(key, lambda: _zeros(rows.shape[1], rows.device))
        backend.accumulate_hessian(total, rows)
        if not bool(torch.isfinite(total.diagonal()).all()):
            raise CalibrationError(not_finite(f"the input of {key}", x, self._samples))
        self._tokens[key] = self._tokens.get(key, 0) + rows.shape[0]
        original = self._recorded.pop(key, None)
        if original is not None:
            cross = (original.T @ rows).double()
            if not bool(torch.isfinite(cross).all()):
                what = f"the original model's input of {key}"
                raise CalibrationError(not_finite(what, original.to(x.dtype), self._samples))
            self._crosses.add(key, cross)

    def statistics(self, device: torch.device) -> dict[str, InputStatistics]:
        """Return key -> statistics of each input, H [n, n] float32; the sums are freed.

        A matrix that was never applied has an input of its own: tokens 0, H zero. Each input has an
        owner among the ranks; on the others its H is on the meta device.

        Raises:
            CalibrationError: not one matrix of an experts' parameter was seen in use, or two
                matrices share their input only sometimes.
        """
        seen = self._ranks.together(self._seen_here)
        self._join(seen)
        columns = self.inputs()
        owners = greedy_owners(self.costs(), self._ranks.count)
        sums, crosses = [one.sums for one in seen], [one.crosses for one in seen]
        result = {}
        for key, n in columns.items():
            tokens = self._tokens.get(key, 0)
            empty = partial(_zeros, n, device)
            total = self._sums.moved(key, sums, owners[key], empty)
            cross = self._crosses.moved(key, crosses, owners[key], empty)
            if owners[key] != self._ranks.index:
                away = torch.empty(n, n, device="meta")
                result[key] = InputStatistics(away, tokens, None, tokens or None)
            elif total is None:
                result[key] = InputStatistics(torch.zeros(n, n, device=device), 0)
            else:
                result[key] = _finished(total, cross, tokens)
        return result

    def _seen_here(self) -> "_Seen":
        return _Seen(dict(self.keys), dict(self._tokens), self._sums.held(), self._crosses.held())

    def _join(self, seen: Sequence["_Seen"]) -> None:
        """Take the keys and the numbers of tokens of all ranks.

        Raises:
            CalibrationError: see `statistics`.
        """
        self.keys.clear()
        self._tokens.clear()
        for one in seen:
            for (name, part), key in one.keys.items():
                if self.keys.setdefault((name, part), key) != key:
                    raise self._sometimes(self._by_name[name].key(part), self.keys[name, part])
            for key, tokens in one.tokens.items():
                self._tokens[key] = self._tokens.get(key, 0) + tokens
        for layout in self._layouts:
            used = [part for part in range(layout.parts) if (layout.name, part) in self.keys]
            if layout.parts > 1 and not used:
                raise CalibrationError(
                    f"{layout.name}: how its experts are used cannot be followed: exclude it."
                )
            for part in range(layout.parts):
                self.keys.setdefault((layout.name, part), layout.key(part))

    def inputs(self) -> dict[str, int]:
        """Return the number of columns of each input, in the order of the matrices."""
        columns: dict[str, int] = {}
        for layout in self._layouts:
            for part in range(layout.parts):
                columns.setdefault(self.keys[layout.name, part], layout.matrix_shape[1])
        return columns

    def costs(self) -> dict[str, float]:
        """Return the predicted cost of the matrices of each input."""
        rows: dict[str, int] = {}
        for layout in self._layouts:
            for part in range(layout.parts):
                key = self.keys[layout.name, part]
                rows[key] = rows.get(key, 0) + layout.matrix_shape[0]
        return {key: search_cost(rows[key], n) for key, n in self.inputs().items()}

    @staticmethod
    def _sometimes(matrix: str, key: str) -> CalibrationError:
        return CalibrationError(
            f"{matrix} shares its input with {key} in some runs only: exclude it."
        )


@dataclass(frozen=True)
class _Seen:
    """Keys and tokens that one rank has seen, and the shards of which it has sums and cross
    moments."""

    keys: dict[Label, str]
    tokens: dict[str, int]
    sums: dict[str, list[int]]
    crosses: dict[str, list[int]]


def _zeros(n: int, device: torch.device) -> Tensor:
    """Return a sum [n, n] float64 of nothing."""
    return torch.zeros(n, n, dtype=torch.float64, device=device)


def _finished(moment: Tensor, cross: Tensor | None, tokens: int) -> InputStatistics:
    """Return the statistics of an input, given its sums over `tokens`."""
    hessian = (moment + moment.T) / tokens  # (2/p) X X^T, exactly symmetric
    if cross is not None:
        cross = (2 / tokens * cross).float()
    return InputStatistics(hessian.float(), tokens, cross, tokens)


def not_finite(what: str, x: Tensor, samples: range) -> str:
    """Return the error message for x [..., n], activations of these calibration samples."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    where = f"one of the calibration samples {samples[0]} to {samples[-1]}"
    if rows.shape[0] % len(samples) == 0:  # experts see some tokens only
        energy = rows.square().sum(dim=1).reshape(len(samples), -1).sum(dim=1)
        bad = (~torch.isfinite(energy)).nonzero().flatten().tolist()
        if bad:
            where = f"calibration sample {samples[bad[0]]}"
    remedy = "check the weights and the text."
    if x.dtype == torch.float16:
        remedy = "it overflows float16: save the model as bfloat16 or float32 and compress that."
    return f"{what} has no finite square for {where}: {remedy}"


@dataclass(frozen=True)
class Trace:
    """The weights of a module that share their inputs.

    Attributes:
        leader: parameter name -> the first weight that is always used on the very same inputs; q, k
            and v of an attention have one leader. In the order of first use.
    """

    leader: dict[str, str]

    @property
    def leaders(self) -> list[str]:
        """Leaders of all distinct inputs, in the order of first use."""
        return list(dict.fromkeys(self.leader.values()))

    @property
    def shared(self) -> set[str]:
        """Leaders whose inputs other weights share."""
        return {leader for name, leader in self.leader.items() if name != leader}


@torch.no_grad()
def trace(runner: Runner, batch: Batch) -> Trace:
    """Run one batch and return which weights are applied to the same tensors in the same way."""
    products: list[Product] = []  # keeps every input alive, so that no identity occurs twice
    runner.run(batch, products.append)
    uses: dict[str, list[object]] = {}
    for product in products:
        uses.setdefault(product.name, []).append(product.identity)
    first: dict[tuple[object, ...], str] = {}
    return Trace({name: first.setdefault(tuple(inputs), name) for name, inputs in uses.items()})


class ModuleMoments:
    """Sums of x x^T of the leaders' inputs in a whole module, [groups, n, n] float64 each."""

    def __init__(
        self,
        layouts: Sequence[WeightLayout],
        traced: Trace,
        leaders: Iterable[str],
        *,
        expected: int,
        seed: int,
    ) -> None:
        """Prepare for `expected` samples in all batches together."""
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
            uses = self._open.setdefault(leader, [])
            if product.name == leader:
                uses.append(product)
            elif number >= len(uses) or uses[number].identity != product.identity:
                raise CalibrationError(
                    f"{product.name} shares its input with {leader} in some runs only: exclude it."
                )
        if product.name == leader and leader in self._leaders:
            self._accumulate(leader, product)

    def _accumulate(self, name: str, product: Product) -> None:
        layout, count = self._layouts[name], positions(product)
        sampled = self._positions(count, product.x.device)
        scale = 1.0 if sampled is None else count / len(sampled)
        if name not in self._sums:
            n = layout.matrix_shape[1]
            self._sums[name] = torch.zeros(
                layout.parts, n, n, dtype=torch.float64, device=product.x.device
            )
        total = self._sums[name]
        added = total if sampled is None else torch.zeros_like(total)
        for rows in input_rows(product, sampled):
            if len(rows) == 1:
                backend.accumulate_hessian(added[0], rows[0])
            else:
                added += torch.bmm(rows.mT, rows)
        if sampled is not None:
            total.add_(added, alpha=scale)
        if not bool(torch.isfinite(total.diagonal(dim1=1, dim2=2)).all()):
            raise CalibrationError(
                f"the input of {name} is not finite in float32 in calibration batch "
                f"{self._batches}: check the inputs and the weights."
            )

    def _positions(self, count: int, device: torch.device) -> Tensor | None:
        """Return positions drawn from `count` by seed, batch and product, ascending; None: all."""
        if count <= self._most:
            return None
        generator = torch.Generator().manual_seed(
            (self._seed * 1_000_003 + self._batches * 100_003 + self._products) % 2**63
        )
        chosen = torch.randperm(count, generator=generator)[: self._most]
        return chosen.sort().values.to(device)

    def statistics(self) -> dict[str, InputStatistics]:
        """Return key -> statistics of that input; the sums are freed.

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
    """Return the bytes of an input's statistics: the sum in float64, H in float32."""
    return 12 * layout.parts * layout.matrix_shape[1] ** 2


def layer_groups(
    layouts: Mapping[str, WeightLayout], traced: Trace, budget: int, *, single: bool
) -> list[list[str]]:
    """Return the leaders in the order of first use, in groups whose Hessians take at most `budget`
    bytes; a larger Hessian is a group by itself, and with `single` each one is."""
    groups: list[list[str]] = []
    room = 0
    for leader in traced.leaders:
        size = hessian_bytes(layouts[leader])
        if not groups or single or size > room:
            groups.append([])
            room = budget
        groups[-1].append(leader)
        room -= size
    return groups
