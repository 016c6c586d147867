"""What the decoder needs to write weights: the levels of all symbols, and a place for escapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cerwu_gpu.coded import Reconstruction
from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.kernels.ans_batch import Batch, Items


class Levels:
    """Levels of a batch's symbols; escapes are noted by the kernel and filled in afterwards.

    Attributes:
        levels: [slots] float32, what a symbol's weight is before it is scaled; nan for escapes.
        alphabets: per matrix FIELDS numbers: size of the alphabet without escape symbols; number of
            the matrix's first escape, and how many it has.
        found: [matrices] int32, the kernel counts the escapes here.
        places: [escapes] int64, and leaves their places here: 4 * element + 2 * parity of the
            escape symbol + quantizer, elements counted row by row.
        present: there are escape symbols.
    """

    FIELDS = 3

    def __init__(self, batch: Batch, rules: Sequence[Reconstruction]) -> None:
        self._batch = batch
        device = batch.device
        sizes = [rule.size for rule in rules]
        counts = [len(rule.escapes) for rule in rules]
        self._escapes = Items(counts, device)
        self._values = torch.cat([rule.escapes.to(torch.int32) for rule in rules])
        fields = [sizes, self._escapes.firsts, counts]
        self.alphabets = torch.tensor(fields, device=device).T.contiguous()
        self.present = sizes != batch.alphabets
        self.found = torch.zeros(len(sizes), dtype=torch.int32, device=device)
        self.places = torch.empty(sum(counts), dtype=torch.int64, device=device)

        owner = batch.slots.owner
        lowest = torch.tensor([rule.lowest for rule in rules], device=device)[owner]
        integer = (batch.symbol + lowest).to(torch.int32)
        escape = batch.symbol >= self.alphabets[owner, 0]
        levels = _level(integer, batch.quantizer, batch.quantizers[owner])
        self.levels = levels.masked_fill(escape, torch.nan)
        for first, rule in zip(batch.slots.firsts, rules, strict=True):
            if rule.grid is not None:
                self.levels[first : first + rule.size] = rule.grid

    def fill_escapes(self, out: Tensor, steps: Tensor, scales: Tensor) -> None:
        """Write the weights of the escapes where the kernel found them.

        Args:
            out: [elements], the transposes of all matrices.
            steps, scales: float32, of all columns and of all rows.

        Raises:
            CorruptionError: a matrix (named) has not as many escapes as values for them, or one of
                another parity.
        """
        if not self.present:
            return
        batch, owner = self._batch, self._escapes.owner
        for name, found, stored in zip(
            batch.names, self.found.tolist(), self._escapes.sizes, strict=True
        ):
            if found != stored:
                raise CorruptionError(f"{name}: escapes are missing; get it again.")
        places = self.places.sort().values
        m, n = batch.rows.size[owner], batch.columns.size[owner]
        element, parity, quantizer = places >> 2, (places >> 1) & 1, places & 1
        wrong = (parity != (self._values & 1)) & (batch.quantizers[owner] > 1)
        if bool(wrong.any()):
            name = batch.names[int(owner[wrong][0])]
            raise CorruptionError(f"{name}: an escape has the wrong parity; get it again.")
        first = torch.tensor(batch.first_element, device=out.device)[owner]
        row = (element - first) // n
        column = element - first - row * n
        level = _level(self._values, quantizer, batch.quantizers[owner])
        level *= steps[batch.columns.first[owner] + column]
        level *= scales[batch.rows.first[owner] + row]
        out[first + column * m + row] = level.to(out.dtype)


def _level(integer: Tensor, quantizer: Tensor, quantizers: Tensor) -> Tensor:
    """The integer itself, or 2q - sgn(q) [quantizer 1] for q under a trellis (2 quantizers)."""
    second = (quantizer * integer.sign()).to(torch.int32)
    return (integer * quantizers.to(torch.int32) - second).to(torch.float32)
