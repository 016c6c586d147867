r"""What an error of each output costs a module: mean squared gradients of its loss.

With a loss of one's own, L is the sum of what it gives for the samples. Without one the output is
taken for the logits of classes, and L for the negative log likelihood of a label drawn from the
model's own distribution p, softened by TEMPERATURE. The expectation over labels of the squared
gradient is that of the logits' gradient S v, for S S^T = diag(p) - p p^T and any v with independent
entries +-1:

    S = (I - p 1^T) diag(sqrt(p)),   E_v[(J^T S v)_i^2] = (J^T (diag(p) - p p^T) J)_ii.

One v per sample takes one backward pass, whatever the number of classes, and unlike drawn labels
it says something about samples of which the model is all but certain.

A convolution makes the same error at all positions of a sample, and where the network pools them
the errors add up; as the gradients at different positions are alike, so are their products. So not
the squares at single positions are counted but those of their sum: with x_p the inputs and g_ip the
gradients at output i at the positions p of a sample,

    alpha_i = mean over samples |sum_p g_ip x_p|^2 / mean over samples sum_p |x_p|^2,

the squared gradient of the loss by the weights of row i over the trace of H/2. With one position
per sample, or with independent gradients, it is the mean of g_i^2.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.progress import tracked
from cerwu_gpu.vision.products import Product, input_rows, output_rows, positions
from cerwu_gpu.vision.running import Batch, Runner, evaluating, samples

Loss = Callable[[Any, Any], Tensor]
"""(the module's output, the batch) -> one loss per sample [samples], in nats."""

TEMPERATURE = 4.0
"""Networks are all but certain of images that they were trained on, and the curvature of the loss
there says little about those that they are not certain of: at 1, ResNet-20 needs more bits."""
SENSITIVITY_SAMPLES = 1024
"""So many samples tell the sensitivities: they are means over outputs that differ by decades."""
GRADIENT_ELEMENTS = 1 << 24
"""Gradients by weights are computed for so many elements at a time, at least for one sample."""


def output_sensitivities(
    module: nn.Module,
    layouts: Sequence[WeightLayout],
    batches: Sequence[Batch],
    *,
    loss: Loss | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> dict[tuple[str, int], Tensor]:
    """alpha of every output of every chosen weight, see above.

    One backward pass over the first SENSITIVITY_SAMPLES samples. Gradients are in the module's
    dtype, products in float32, squares are summed in float64. Several uses of a weight count as
    independent. A weight that the loss does not depend on gets zeros.

    Args:
        module: run in eval mode with its original weights; no gradient is left in it.
        layouts: the weights to compress (layers.find_weights).
        batches: the inputs of the whole module (running.held).
        loss: see above.
        seed: draws the directions v.

    Returns:
        (parameter name, part) -> alpha [m] float32 on the CPU.

    Raises:
        CalibrationError: the outputs are no logits [samples, classes] and there is no loss, the
            loss is not one number per sample, or a gradient is not finite.
    """
    squares = _Squares()
    weights: dict[str, Tensor] = {
        layout.name: module.get_parameter(layout.name) for layout in layouts
    }
    target = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    done = 0
    with evaluating(module, target), _requiring_grad(weights), torch.inference_mode(False):
        runner = Runner(module, weights, target)
        for batch in tracked(batches, what="sensitivities", unit="batch", shown=progress):
            if done >= SENSITIVITY_SAMPLES:
                break
            with torch.enable_grad():
                output = runner.run(batch, squares.watch)
                total = _total(output, batch, loss, generator)
                torch.autograd.grad(total, list(weights.values()), allow_unused=True)
            done += samples(batch)
    return {
        (layout.name, part): alpha
        for layout in layouts
        for part, alpha in enumerate(squares.mean(layout).chunk(layout.parts))
    }


def _total(output: Any, batch: Batch, loss: Loss | None, generator: torch.Generator) -> Tensor:
    """The scalar whose gradient at the outputs is wanted."""
    if loss is not None:
        each = loss(output, batch)
        if not isinstance(each, Tensor) or each.shape != (samples(batch),):
            raise CalibrationError(
                "the loss must give one number per sample, without a mean or a sum over them."
            )
        return each.sum()
    logits = _logits(output)
    if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
        raise CalibrationError(
            "the module's output is no tensor of logits [samples, classes]: give a loss, or take "
            "sensitivity none or relative."
        )
    p = torch.softmax(logits.detach().float() / TEMPERATURE, dim=1)
    signs = torch.randint(0, 2, p.shape, generator=generator).to(p.device, p.dtype) * 2 - 1
    drawn = p.sqrt() * signs
    return (logits.float() * (drawn - p * drawn.sum(dim=1, keepdim=True))).sum()


def _logits(output: Any) -> Tensor | None:
    """A tensor, or what an output object of transformers calls its logits."""
    found = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
    return found if isinstance(found, Tensor) else None


class _requiring_grad:
    """Have the weights take part in autograd for a while."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._frozen = [weight for weight in weights.values() if not weight.requires_grad]

    def __enter__(self) -> None:
        for weight in self._frozen:
            weight.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for weight in self._frozen:
            weight.requires_grad_(False)


class _Squares:
    """Sums of squared gradients by rows of weights, and of squared inputs, both float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._energies: dict[str, Tensor] = {}

    def watch(self, product: Product) -> None:
        """Add what a product tells when the gradient at its output is computed."""

        def note(gradient: Tensor) -> None:
            squares, energy = gradient_squares(product, gradient)
            if not bool(torch.isfinite(squares).all() & torch.isfinite(energy).all()):
                raise CalibrationError(
                    f"the gradient at the output of {product.name} is not finite in float32: "
                    "check the weights and the inputs."
                )
            for sums, own in ((self._sums, squares), (self._energies, energy)):
                known = sums.get(product.name)
                sums[product.name] = own if known is None else known + own

        if product.output.requires_grad:
            product.output.register_hook(note)  # type: ignore[no-untyped-call]

    def mean(self, layout: WeightLayout) -> Tensor:
        """alpha of all outputs of a parameter, float32 on the CPU; zeros without any."""
        rows = layout.matrix_shape[0]
        if layout.name not in self._sums:
            return torch.zeros(layout.parts * rows)
        energy = self._energies[layout.name].repeat_interleave(rows)
        alpha = torch.where(energy > 0, self._sums[layout.name] / energy, 0.0)
        return alpha.float().cpu()


def gradient_squares(product: Product, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over samples of |sum_p g_ip x_p|^2 [m], and of sum_p |x_p|^2 [groups], float64."""
    count = positions(product)
    flat = output_rows(product, gradient.detach())
    m = flat.shape[1]
    g = flat.reshape(-1, count, m)
    squares, energy, first = g.new_zeros(m, dtype=torch.float64), torch.zeros(()), 0
    for rows in input_rows(product, None):
        groups, n = len(rows), rows.shape[2]
        x = rows.reshape(groups, -1, count, n)
        some = x.shape[1]
        own = g[first : first + some].reshape(some, count, groups, -1)
        first += some
        energy = energy + x.square().sum(dim=(1, 2, 3)).double()
        step = max(1, GRADIENT_ELEMENTS // (m * n))
        for inputs, slopes in zip(torch.split(x, step, dim=1), torch.split(own, step), strict=True):
            weights = torch.einsum("gspn,spgm->gsmn", inputs, slopes)
            squares += weights.square().sum(dim=(1, 3)).flatten().double()
    return squares, energy
