"""Vision-language models calibrated by images and text: pairs that the model's processor makes.

A sample is an image and, behind it, a window of the text, in the model's chat template where it has
one. The model runs whole, so that its tower, the projection and the text blocks all see what they
see in use. Tokens that stand for an image are predicted by nobody and count in no loss.
"""

from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from cerwu_gpu.config import CompressionConfig, ImageTextCalibration
from cerwu_gpu.errors import CalibrationError, CerwuError, ModelError, reason
from cerwu_gpu.hf.causal_lm import select
from cerwu_gpu.hf.images import load_pictures
from cerwu_gpu.hf.models import LoadedModel, check_tokens
from cerwu_gpu.hf.sources import Windows, calibration_tokens, usual_samples
from cerwu_gpu.hf.text import SELF
from cerwu_gpu.hf.whole_text import WholeLM
from cerwu_gpu.models.selection import matches, select_in_module, towers

Inputs = dict[str, Tensor]
"""Keyword arguments of the model, input_ids first; each tensor's first axis counts samples or, of
images in parts, the parts of all samples."""


class ImagesAndText(WholeLM):
    """A vision-language model with images and text; it runs whole."""

    @property
    def unpredicted(self) -> int | None:
        return image_token(self.module)


def has_image_tower(model: PreTrainedModel) -> bool:
    """Return whether a part of the model takes images alone."""
    return any("image" in getattr(tower, "input_modalities", ()) for _, tower in towers(model))


def image_token(model: PreTrainedModel) -> int | None:
    """Return the id of the token that stands for a part of an image."""
    config: Any = model.config
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    return None


def image_text_batches(
    loaded: LoadedModel, config: CompressionConfig, given: ImageTextCalibration
) -> tuple[list[Inputs], tuple[str, ...]]:
    """Return batches of a model's inputs for a calibration, and what did not go as planned.

    Raises:
        ModelError: the model has no processor, or it has experts.
        CalibrationError: images or text are missing, or an image leaves no place for text.
    """
    model, name = loaded.model, type(loaded.model).__name__
    chosen = select_in_module(model, config.include, config.exclude).chosen
    experts = [x.name for x in select(model).chosen if len(x.shape) == 3]
    if any(matches(x, config.include) and not matches(x, config.exclude) for x in experts):
        raise ModelError(
            f"{name} has experts, which show their inputs only block by block: calibrate it on "
            "text alone, or exclude them."
        )
    token = image_token(model)
    if token is None:
        raise ModelError(
            f"the configuration of {name} names no token for images: calibrate on text alone."
        )
    text = given.text
    if any(source == SELF for source, _ in text.sources):
        raise CalibrationError(f"{name} writes no text of its own beside images: give a text.")
    columns = max(layout.matrix_shape[1] for layout in chosen)
    windows = Windows(
        samples=text.samples or usual_samples(columns, text),
        sequence_length=text.sequence_length,
        seed=text.seed,
        batch_size=text.batch_size,
    )
    tokens = calibration_tokens(
        text.sources or ImagesAndText.usual_sources, model, loaded.tokenizer, windows
    )
    tokenizer: Any = loaded.tokenizer  # calibration_tokens needs it
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens.tokens]
    prepare = _Processor(loaded.files, text.sequence_length, token)
    pictures = load_pictures(given.images, count=len(texts), seed=text.seed)
    pairs = zip(islice(cycle(pictures), len(texts)), texts, strict=True)
    batches = list(_batched((prepare(*pair) for pair in pairs), text.batch_size))
    for batch in batches:
        check_tokens(model, batch["input_ids"], batch["input_ids"].shape[1])
    return batches, tokens.events


class _Processor:
    """A model's own processor, which makes inputs of an image and a text."""

    def __init__(self, files: Path | None, length: int, image_token: int) -> None:
        """Read it.

        Raises:
            ModelError: there is none, or no way to place an image in a text.
        """
        if files is None:
            raise ModelError("the model has no directory with a processor: give one.")
        try:
            load: Any = AutoProcessor.from_pretrained
            self._processor: Any = load(files)
            if not isinstance(self._processor, ProcessorMixin):
                raise ValueError(f"it has a {type(self._processor).__name__} alone")
        except Exception as error:  # whatever a processor's files and libraries raise
            raise ModelError(
                f"{files} has no processor of images and text ({reason(error)}): put its files "
                "beside the weights."
            ) from error
        self._files = files
        self._length = length
        self._image_token = image_token
        # Gemma 3 has one token to mark the place, and others that stand there.
        marks = (getattr(self._processor, name, None) for name in ("boi_token", "image_token"))
        self._mark = next((mark for mark in marks if mark is not None), None)
        self._chats = getattr(self._processor, "chat_template", None) is not None
        if self._mark is None and not self._chats:
            raise ModelError(
                f"the processor in {files} has neither a chat template nor a token for images: "
                "calibrate on text alone."
            )

    def __call__(self, image: Any, text: str) -> Inputs:
        """Return the inputs of one sample.

        Raises:
            ModelError: the processor fails.
            CalibrationError: the image leaves no place for text.
        """
        try:
            made = dict(self._made(image, text))
        except CerwuError:
            raise
        except Exception as error:  # whatever the processor's code makes of it
            raise ModelError(
                f"the processor in {self._files} cannot take an image and a text: {reason(error)}"
            ) from error
        ids = made.pop("input_ids")
        standing = ids[0] == self._image_token
        needed = int(standing.nonzero().max()) + 2 if bool(standing.any()) else 2
        if needed > self._length:
            raise CalibrationError(
                f"sequence_length is {self._length}, and an image takes {needed - 1} tokens with "
                f"what stands before it: give more than {needed}."
            )
        inputs = {"input_ids": ids, **made}
        return {
            name: x[:, : self._length] if x.shape[:2] == ids.shape else x
            for name, x in inputs.items()
            if isinstance(x, Tensor)
        }

    def _made(self, image: Any, text: str) -> Mapping[str, Any]:
        if not self._chats:
            made: Mapping[str, Any] = self._processor(
                text=f"{self._mark}{text}", images=image, return_tensors="pt"
            )
            return made
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        chat: Mapping[str, Any] = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return chat


def _batched(samples: Iterator[Inputs], size: int) -> Iterator[Inputs]:
    """Yield samples joined along their first axes: at most `size` neighbours of one shape."""
    group: list[Inputs] = []
    for sample in samples:
        if group and (len(group) == size or not _alike(group[0], sample)):
            yield _joined(group)
            group = []
        group.append(sample)
    if group:
        yield _joined(group)


def _alike(a: Inputs, b: Inputs) -> bool:
    return a.keys() == b.keys() and all(a[name].shape[1:] == b[name].shape[1:] for name in a)


def _joined(group: list[Inputs]) -> Inputs:
    return {name: torch.cat([sample[name] for sample in group]) for name in group[0]}
