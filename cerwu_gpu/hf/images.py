"""Images for calibration and evaluation of classifiers, and what they are judged by."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, PreTrainedModel

from cerwu_gpu.errors import CalibrationError, ModelError, reason
from cerwu_gpu.files import local_path
from cerwu_gpu.hf.models import local_directory
from cerwu_gpu.hf.text import Part

SPLITS: dict[Part, tuple[str, ...]] = {
    "calibration": ("train",),
    "evaluation": ("test", "validation", "train"),
}
"""Names of a dataset's splits, by preference."""


@dataclass(frozen=True)
class Images:
    """Images in the form of a classifier's inputs.

    Attributes:
        batches: pixel values, float32 [samples, channels, height, width] each.
        labels: int64 [samples] for each batch, by the model's numbering; None where the data have
            none.
    """

    batches: list[Tensor]
    labels: list[Tensor] | None


@dataclass(frozen=True, kw_only=True)
class ImageComparison:
    """Accuracy of a classifier on labelled images, and its distance from its original, if given."""

    accuracy: float
    """Share of the images whose label has the largest logit."""
    original_accuracy: float | None = None
    kl_divergence: float | None = None
    """Mean of KL(original || compressed) per image, in nats."""
    top1_agreement: float | None = None
    """Share of the images whose largest logit is at the same class in both models."""
    images: int


def load_images(
    name: str,
    model: str | Path,
    *,
    part: Part,
    labels: dict[str, int] | None = None,
    count: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Images:
    """Load images from a directory or a hub dataset, processed as the model's own files ask.

    Args:
        name: directory of image files, with labels as names of folders if there are such, and
            above them splits (train, test) if there are such; or a hub dataset.
        model: hub name or directory that holds the image processor's settings.
        part: purpose of the images, which chooses the split.
        labels: the model's name of a class -> its number; None: the dataset's own numbers.
        count: number of images, drawn at random by `seed`; None: all.
        batch_size: images per batch.

    Raises:
        CalibrationError: the images cannot be loaded, or the model has no such class.
        ModelError: the model has no image processor.
    """
    rows, column = _drawn(name, part, count, seed)
    label_column = _column(rows, "ClassLabel")
    process = _processor(model)
    numbers = None if label_column is None else _numbering(rows.features[label_column], labels)
    if label_column is not None and min(rows[label_column], default=0) < 0:
        raise CalibrationError(f"{name} has images without a label: give labelled ones.")
    batches, targets = [], []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        images = [image.convert("RGB") for image in batch[column]]
        batches.append(process(images=images, return_tensors="pt")["pixel_values"])
        if label_column is not None and numbers is not None:
            targets.append(torch.tensor([numbers[label] for label in batch[label_column]]))
    return Images(batches, targets if numbers is not None else None)


def load_pictures(name: str, *, count: int, seed: int) -> list[Any]:
    """Return at most `count` images of the calibration part of a directory or a hub dataset, as
    `load_images` draws them, RGB images of PIL.

    Raises:
        CalibrationError: the images cannot be loaded.
    """
    rows, column = _drawn(name, "calibration", count, seed)
    return [image.convert("RGB") for image in rows[column]]


def _drawn(name: str, part: Part, count: int | None, seed: int) -> tuple[Any, str]:
    """Return rows of a dataset, and the name of their column of images.

    Raises:
        CalibrationError: there are no images.
    """
    rows = _dataset(name, part)
    column = _column(rows, "Image")
    if column is None or not len(rows):
        raise CalibrationError(f"{name} holds no images: give a directory or dataset of images.")
    if count is not None and count < len(rows):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        rows = rows.select(chosen[:count].sort().values.tolist())
    return rows, column


def _dataset(name: str, part: Part) -> Any:
    """Return the rows of the split for `part`."""
    from datasets import load_dataset

    folder = local_path(name)
    try:
        if folder.is_dir():
            splits: Any = load_dataset("imagefolder", data_dir=str(folder))
        else:
            splits = load_dataset(name)
        split = next(split for split in SPLITS[part] if split in splits)
    except Exception as error:
        raise CalibrationError(
            f"the images {name} cannot be loaded ({reason(error)}): give a directory of images, or "
            "check the dataset's name and the network."
        ) from error
    return splits[split]


def _column(rows: Any, kind: str) -> str | None:
    """Return the name of the first column of a kind of datasets' features."""
    return next((c for c, x in rows.features.items() if type(x).__name__ == kind), None)


def _processor(model: str | Path) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            local_directory(model)
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{model} has no image processor ({reason(error)}): put its preprocessor_config.json "
            "beside the weights."
        ) from error


def _numbering(feature: Any, labels: dict[str, int] | None) -> list[int]:
    """Return the model's number for each class of a dataset.

    Raises:
        CalibrationError: the model does not know a class.
    """
    unnamed = labels is not None and all(re.fullmatch(r"LABEL_\d+", name) for name in labels)
    if labels is None or (unnamed and len(labels) == len(feature.names)):
        return list(range(len(feature.names)))
    unknown = [name for name in feature.names if name not in labels]
    if unknown:
        raise CalibrationError(
            f"the model has no class {unknown[0]!r}: give images of its classes."
        )
    return [labels[name] for name in feature.names]


@torch.no_grad()
def compare_on_images(
    model: PreTrainedModel, images: Images, original: PreTrainedModel | None = None
) -> ImageComparison:
    """Return the accuracy of a classifier, and its distance from its original.

    Raises:
        CalibrationError: the images have no labels.
    """
    if images.labels is None:
        raise CalibrationError("the images have no labels: put them into folders by class.")
    right = original_right = agreed = divergence = 0.0
    for batch, labels in zip(images.batches, images.labels, strict=True):
        logits = _class_logits(model, batch)
        right += float((logits.argmax(dim=1) == labels).sum())
        if original is not None:
            before = _class_logits(original, batch)
            original_right += float((before.argmax(dim=1) == labels).sum())
            agreed += float((before.argmax(dim=1) == logits.argmax(dim=1)).sum())
            log_p, log_q = before.log_softmax(dim=1), logits.log_softmax(dim=1)
            divergence += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    count = sum(map(len, images.labels))
    if original is None:
        return ImageComparison(accuracy=right / count, images=count)
    return ImageComparison(
        accuracy=right / count,
        original_accuracy=original_right / count,
        kl_divergence=divergence / count,
        top1_agreement=agreed / count,
        images=count,
    )


def _class_logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Return logits [samples, classes] float64 on the CPU."""
    logits: Tensor = model(batch.to(model.device, model.dtype)).logits
    return logits.double().cpu()
