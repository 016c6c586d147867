"""Second moments of every distinct input of a block's weights, seen while the block runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cerwu_gpu import backend
from cerwu_gpu.blocks import InputStatistics
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.layout import WeightLayout

Label = tuple[str, int]
"""(parameter name, part): one matrix."""

_PRODUCTS = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__})
_PRODUCTS |= {torch.mm, torch.Tensor.mm}


class _AllSeen(Exception):
    """Ends a run whose outputs nobody needs."""


class InputMoments:
    """Sums of x x^T per distinct input, in float64.

    Two matrices share an input when the model hands the same tensor object to both; the input is
    named after the matrix that sees it first.

    Attributes:
        keys: matrix -> name of its input, for the matrices seen so far.
    """

    def __init__(self, layouts: Sequence[WeightLayout]) -> None:
        self.keys: dict[Label, str] = {}
        self._layouts = tuple(layouts)
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._seen: dict[tuple[int, int], tuple[Tensor, str]] = {}
        self._samples = range(0)
        self._recording = self._ends_early = False
        self._recorded: dict[str, Tensor] = {}
        self._due: dict[str, int] = {}  # how often each input is still to be seen
        self._crosses: dict[str, Tensor] = {}

    @contextmanager
    def record(self, samples: range) -> Iterator[None]:
        """One run on the original model's inputs, kept for the `forward` that follows: that one
        then also sums x x_hat^T, x of this run and x_hat of its own.

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
        """One run of the block over the calibration samples with these numbers.

        After `record` the run ends when every input that was recorded has been seen again: nobody
        needs what the block would give.
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

    def add(self, layout: WeightLayout, part: int, x: Tensor) -> None:
        """Note that matrix `part` of `layout` is applied to `x` [..., n].

        Raises:
            CalibrationError: x is not finite, or two matrices share their input only sometimes.
        """
        own = layout.key(part)
        # The version tells a tensor from itself after a change in place; keeping x keeps its id.
        seen = self._seen.setdefault((id(x), x._version), (x, own))[1]
        if self.keys.setdefault((layout.name, part), seen) != seen:
            raise CalibrationError(
                f"{own} shares its input with {self.keys[layout.name, part]} in some runs only: "
                "exclude it."
            )
        if seen == own and not (self._recording and layout.parts > 1):
            self._accumulate(own, x)
            if self._ends_early:
                self._due[own] -= 1
                if not any(self._due.values()):
                    raise _AllSeen

    def _accumulate(self, key: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self._recording:
            self._recorded[key] = rows
            self._due[key] = self._due.get(key, 0) + 1
            return
        if key not in self._sums:
            n = rows.shape[1]
            self._sums[key] = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
        backend.accumulate_hessian(self._sums[key], rows)
        if not bool(torch.isfinite(self._sums[key].diagonal()).all()):
            raise CalibrationError(not_finite(f"the input of {key}", x, self._samples))
        self._tokens[key] = self._tokens.get(key, 0) + rows.shape[0]
        original = self._recorded.pop(key, None)
        if original is not None:
            cross = (original.T @ rows).double()
            if not bool(torch.isfinite(cross).all()):
                what = f"the original model's input of {key}"
                raise CalibrationError(not_finite(what, original.to(x.dtype), self._samples))
            self._crosses[key] = self._crosses[key] + cross if key in self._crosses else cross

    def statistics(self, device: torch.device) -> dict[str, InputStatistics]:
        """H [n, n] float32 per input, key -> statistics; the sums are given up.

        A matrix that was never applied has an input of its own: tokens 0, H zero.

        Raises:
            CalibrationError: not one matrix of an experts' parameter was seen in use.
        """
        result = {}
        for layout in self._layouts:
            used = [part for part in range(layout.parts) if (layout.name, part) in self.keys]
            if layout.parts > 1 and not used:
                raise CalibrationError(
                    f"{layout.name}: how its experts are used cannot be followed: exclude it."
                )
            for part in range(layout.parts):
                key = self.keys.setdefault((layout.name, part), layout.key(part))
                if key not in result:
                    result[key] = self._finished(key, layout.matrix_shape[1], device)
        return result

    def _finished(self, key: str, columns: int, device: torch.device) -> InputStatistics:
        tokens = self._tokens.get(key, 0)
        if tokens == 0:
            return InputStatistics(torch.zeros(columns, columns, device=device), 0)
        moment = self._sums.pop(key)
        hessian = (moment + moment.T) / tokens  # (2/p) X X^T, exactly symmetric
        cross = self._crosses.pop(key, None)
        if cross is not None:
            cross = (2 / tokens * cross).float()
        return InputStatistics(hessian.float(), tokens, cross)


def not_finite(what: str, x: Tensor, samples: range) -> str:
    """The sentence that says so of x [..., n], the activations of these calibration samples."""
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


@contextmanager
def observed(
    modules: Mapping[str, nn.Module], layouts: Sequence[WeightLayout], moments: InputMoments
) -> Iterator[None]:
    """While this is open, `moments` sees the inputs of the weights described by `layouts`.

    Args:
        modules: parameter name -> the module that owns it.
    """
    experts = [layout for layout in layouts if len(layout.shape) == 3]

    def note(layout: WeightLayout, part: int, x: Tensor, output: Tensor) -> None:
        moments.add(layout, part, x)

    with ExitStack() as stack:
        for layout in layouts:
            if len(layout.shape) == 2:
                hook = _linear_hook(layout, moments)
                handle = modules[layout.name].register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        if experts:
            stack.enter_context(ExpertProducts(modules, experts, note))
        yield


def _linear_hook(layout: WeightLayout, moments: InputMoments) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = arguments[0] if arguments else next(iter(keywords.values()))
        moments.add(layout, 0, x)

    return hook


NoteProduct = Callable[[WeightLayout, int, Tensor, Tensor], None]
"""Called with layout, part, input x [..., n] and output [..., m] of a product."""


class ExpertProducts(TorchFunctionMode):
    """Sees each product with one expert's slice of a parameter [experts, ., .].

    The experts of a mixture are no modules of their own, so no hook can see their inputs; the
    slice is recognised by its address.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        experts: Sequence[WeightLayout],
        note: NoteProduct,
    ) -> None:
        super().__init__()
        self._note = note
        self._slices: dict[int, tuple[WeightLayout, int, tuple[int, ...]]] = {}
        for layout in experts:
            parameter = modules[layout.name].get_parameter(layout.name.rpartition(".")[2])
            for part in range(layout.parts):
                matrix = layout.matrix(parameter, part)
                self._slices[matrix.data_ptr()] = layout, part, matrix.stride()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._see(args[0], args[1], output)
        elif func in _PRODUCTS:
            self._see(args[0], args[1].mT, output)
        return output

    def _see(self, x: Tensor, matrix: Tensor, output: Tensor) -> None:
        """`matrix` [m, n] was applied to x [..., n]."""
        found = self._slices.get(matrix.data_ptr())
        if found is None or matrix.dim() != 2 or matrix.numel() == 0:
            return
        layout, part, stride = found
        if tuple(matrix.shape) != layout.matrix_shape or matrix.stride() != stride:
            raise CalibrationError(
                f"{layout.key(part)} is applied to its inputs in an unknown way: exclude it."
            )
        self._note(layout, part, x, output)
