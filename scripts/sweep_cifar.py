"""The sweep of `cerwu-gpu sweep` on a ResNet for CIFAR-10: table, fronts and fewest bits.

    python scripts/sweep_cifar.py FOLDER --network resnet20 -o OUT

FOLDER holds the weights of akamaster/pytorch_resnet_cifar10 (resnet20-12fca82f.th and
resnet56-4bfd9763.th) and the images test.npz and train2k.npz (`images` uint8 [N, 32, 32, 3],
`labels`). Calibration takes the images of train2k.npz without their labels; accuracy is that on
test.npz of the network that is loaded back from its compressed directory.
"""

import sys
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from cerwu_gpu import CerwuError, CompressionConfig, ModelError
from cerwu_gpu.cli.axes import take_axes, with_axes
from cerwu_gpu.cli.options import closed
from cerwu_gpu.cli.sweep_tables import minimum_table, points_table, time_words
from cerwu_gpu.sweep.model import module_subject
from cerwu_gpu.sweep.points import Axes, System, check_available, grid_points
from cerwu_gpu.sweep.run import HESSIANS, TABLE, check_folder, run_sweep

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 250


class Network(StrEnum):
    """A network and the place of its weights."""

    resnet20 = "resnet20"
    resnet56 = "resnet56"

    @property
    def file(self) -> str:
        return {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}[self]

    @property
    def blocks(self) -> int:
        """Number of residual blocks in each of the three stages."""
        return {"resnet20": 3, "resnet56": 9}[self]


class Block(nn.Module):
    """Two convolutions beside a shortcut without weights."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride, self.missing = stride, after - before
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        half = self.missing // 2
        short = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(short, (0, 0, 0, 0, half, half)))


class ResNet(nn.Module):
    """Network of 6 n + 2 layers for images of 32 x 32 and 10 classes (He et al. 2015, 4.2)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage, (before, after) in enumerate(pairwise(widths), start=1):
            first = Block(before, after, 1 if stage == 1 else 2)
            rest = [Block(after, after, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(x.mean(dim=(2, 3)))


def load_network(folder: Path, network: Network) -> ResNet:
    """Load the trained network in eval mode.

    Raises:
        ModelError: the file is missing or holds another network.
    """
    module = ResNet(network.blocks)
    try:
        state = torch.load(folder / network.file, map_location="cpu", weights_only=True)
        weights = {k.removeprefix("module."): v for k, v in state["state_dict"].items()}
        module.load_state_dict(weights)
    except (OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder / network.file} cannot be read: check the folder.") from error
    return module.eval()


def load_images(path: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Load normalised images [count, 3, 32, 32] float32 and labels [count] int64.

    Raises:
        ModelError: the file is missing or holds something else.
    """
    try:
        with np.load(path) as stored:
            images, labels = stored["images"][:count], stored["labels"][:count]
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: check the folder.") from error
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(SPREAD)[:, None, None]
    return x, torch.from_numpy(labels.astype(np.int64))


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of the images whose label has the largest logit."""
    classes = [module(batch).argmax(dim=1) for batch in torch.split(images, BATCH)]
    return float((torch.cat(classes) == labels).double().mean())


AXES = Axes(
    systems=get_args(System),
    quantizers=("scalar", "trellis8"),
    lmbdas=(2e-6, 5e-6, 1e-5, 1.5e-5, 2e-5, 3e-5, 5e-5),
    sensitivities=("balanced",),
    drifts=(True,),
    levels=(8, 16, 32),
    uniform_lmbdas=(3e-4, 1e-3, 3e-3, 1e-2),
    qps=(-26, -24, -22, -20, -18, -16),
)
"""The grid of the comparisons in docs/paper.md."""


@closed
@with_axes(before="images", defaults=AXES)
def main(
    folder: Annotated[Path, typer.Argument(help="Folder with the weights and images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the table.")],
    network: Annotated[Network, typer.Option()] = Network.resnet20,
    images: Annotated[
        int | None, typer.Option("--images", help="Number of test images; default: all.")
    ] = None,
    calibration_images: Annotated[
        int, typer.Option(help="Number of images that calibrate.")
    ] = 2000,
    **axes: Any,
) -> None:
    """Run the missing points of the sweep and print its tables."""
    base = CompressionConfig()
    points = grid_points(take_axes(axes), base)
    check_available(points)
    check_folder(output, {"the data": folder})
    test, labels = load_images(folder / "test.npz", images)
    calibration, _ = load_images(folder / "train2k.npz", calibration_images)
    subject = module_subject(
        network.value,
        load_network(folder, network),
        torch.split(calibration, BATCH),
        lambda module: accuracy(module, test, labels),
        base=base,
        hessian_cache=output / HESSIANS,
        data=f"accuracy on the first {len(test)} images of test.npz",
        progress=True,
    )
    rows = run_sweep(subject, points, output, progress=True)
    typer.echo("\n\n".join([points_table(rows), minimum_table(rows), time_words(rows)]))
    typer.echo(f"\ntable: {output / TABLE}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except CerwuError as error:
        typer.echo(f"sweep_cifar: {error}", err=True)
        sys.exit(2)
