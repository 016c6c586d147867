"""Inputs of a model's linear layers, the gradients behind them, and layers quantized by both."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cerwu_gpu.config import CompressionConfig, Objective
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.quantize.layer import Stack, quantize_stacks
from cerwu_gpu.quantize.objective import quadratic_error

BLOCK = re.compile(r"\.layers\.(\d+)\.")
FEW = 8
"""Sequences of 512 tokens that the sensitivities come from by default."""
FLOOR = 0.05
"""Least weight of a token."""


def linear_layers(model: nn.Module, stride: int) -> dict[str, nn.Linear]:
    """Return the linear layers of every `stride`-th block."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (place := BLOCK.search(name))
        and int(place[1]) % stride == 0
    }


@dataclass
class Seen:
    """One distinct input of a block and the matrices that see it.

    Attributes:
        x: [tokens, n] of each sequence, where tokens are to be weighted.
        moment: sum of x x^T [n, n].
        squares: the token's squared gradient at all of its outputs, [tokens] of each sequence.
        names: of the layers.
    """

    x: list[Tensor] = field(default_factory=list)
    moment: Tensor | float = 0.0
    squares: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


class Gradients:
    """Inputs of linear layers in the blocks, and squared gradients at their outputs.

    Attributes:
        inputs: by the layer that sees them first.
        few, all: mean squared gradients [m] of each layer over the first FEW sequences, and over
            all.
        grams: with `coupled`, mean of g g^T [m, m] of each layer, g the gradient at its outputs.
        original: weights of the layers.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        stride: int = 1,
        *,
        weighted: bool = False,
        coupled: bool = False,
    ) -> None:
        """Run the model forward and backward, sequence by sequence, int64 [samples, length].

        Args:
            stride: distance of the blocks whose layers are quantized.
            weighted: keep what Hessians of weighted tokens need.
            coupled: sum `grams`.
        """
        self._keeps, self._couples = weighted, coupled
        self.grams: dict[str, Tensor] = {}
        self.inputs: dict[str, Seen] = {}
        self.few: dict[str, Tensor] = {}
        self.all: dict[str, Tensor] = {}
        self.tokens = tokens.numel()
        self._first: dict[int, tuple[Tensor, str]] = {}  # a reference keeps the id from reuse
        layers = linear_layers(model, stride)
        self._weights = {name: layer.weight for name, layer in layers.items()}
        self.original = {name: w.detach().clone() for name, w in self._weights.items()}
        hooks = [x.register_forward_hook(self._watch(name)) for name, x in layers.items()]
        model.requires_grad_(False)
        for number, ids in enumerate(tokens, start=1):
            self._first.clear()
            embedded = model.get_input_embeddings()(ids[None]).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
            functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
            if number == FEW:
                self.few = {name: x / FEW for name, x in self.all.items()}
        self.all = {name: x / len(tokens) for name, x in self.all.items()}
        for hook in hooks:
            hook.remove()

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x = arguments[0]
            _, key = self._first.setdefault(id(x), (x, name))
            seen = self.inputs.setdefault(key, Seen())
            if key == name:
                rows = x.detach()[0]
                seen.moment = seen.moment + rows.float().T @ rows.float()
                if self._keeps:
                    seen.x.append(rows)
                seen.squares.append(torch.zeros(x.shape[1]))
            if name not in seen.names:
                seen.names.append(name)
            output.register_hook(lambda g: self._note(name, seen, g[0].float()))

        return forward

    def _note(self, name: str, seen: Seen, gradient: Tensor) -> None:
        if self._couples:
            gram = gradient.T @ gradient / self.tokens
            self.grams[name] = self.grams[name] + gram if name in self.grams else gram
        squares = gradient.square()
        seen.squares[-1] += squares.sum(dim=1)
        mean = squares.mean(dim=0)
        self.all[name] = self.all[name] + mean if name in self.all else mean

    @torch.no_grad()
    def put(self, name: str, weight: Tensor) -> None:
        """Put a weight [m, n] into its layer, rounded to bfloat16 as the file has it."""
        self._weights[name].copy_(weight.to(torch.bfloat16))

    def hessians(self, power: float = 0.0) -> dict[str, Tensor]:
        """Return H of each input, tokens weighted by |gradient|^power, at least FLOOR of the
        mean."""
        result = {}
        for key, seen in self.inputs.items():
            moment = torch.as_tensor(seen.moment)
            if power:
                weights = torch.cat(seen.squares) ** (power / 2)
                weights = (weights / weights.mean()).clamp_min(FLOOR)
                weights /= weights.mean()
                x = torch.cat(seen.x).float()
                moment = x.T @ (weights[:, None] * x)
            result[key] = moment * (2 / self.tokens)
        return result

    @torch.no_grad()
    def quantize(
        self,
        hessians: Mapping[str, Tensor],
        alphas: Mapping[str, Tensor],
        lmbda: float,
        chosen: Callable[[str], bool] = lambda _: True,
    ) -> "Quantized":
        """Put quantized weights into the chosen layers, and the original ones into all others.

        Args:
            alphas: sensitivities [m] of each layer.
        """
        config = CompressionConfig(objective=Objective(lmbda=lmbda), limit_columns=0)
        coded = weights = 0
        loss = 0.0
        for name, weight in self._weights.items():
            weight.copy_(self.original[name])
        for key, seen in self.inputs.items():
            names = [name for name in seen.names if chosen(name)]
            if not names:
                continue
            given = [self.original[name].float() for name in names]
            rows = [alphas[name] for name in names]
            stack = Stack(given, hessians[key], rows, self.tokens)
            (result,) = quantize_stacks([stack], config)
            for name, before, alpha, matrix in zip(
                names, given, rows, result.matrices, strict=True
            ):
                encoded = encode_matrix(matrix, 0.0)
                coded += 4 * len(encoded.words) + len(encoded.side)
                weights += before.numel()
                after = matrix.weight(torch.bfloat16)
                self._weights[name].copy_(after)
                error = quadratic_error(before - after.float(), hessians[key])
                loss += float((alpha * error).sum()) / 4
        return Quantized(8 * coded / weights, loss)


@dataclass(frozen=True)
class Quantized:
    """A quantized model.

    Attributes:
        bits: per quantized weight.
        loss: growth of the loss in nats per token that the sensitivities predict.
    """

    bits: float
    loss: float
