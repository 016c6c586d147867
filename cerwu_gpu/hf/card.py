"""The model card of a compressed directory: README.md as the Hugging Face Hub reads it."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel

from cerwu_gpu import __version__
from cerwu_gpu.container.reader import inventory
from cerwu_gpu.files import lies_inside, local_path, opened, read_text
from cerwu_gpu.hf.evaluation import perplexity_of
from cerwu_gpu.hf.text import SELF, SHORT_NAMES

CARD_FILE = "README.md"
CARRIED_OVER = ("license", "license_name", "license_link", "language")
"""Metadata fields that are copied from the original's card."""
LONGEST_FIELD = 500
"""Maximum characters of such a field."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+ -]*")
_LICENCE_FILES = ("LICENSE*", "LICENCE*")
_LICENCES = {
    "apache-2.0": ("Apache License", "Version 2.0"),
    "mit": ("Permission is hereby granted, free of charge", "THE SOFTWARE IS PROVIDED"),
}
"""Phrases by which a licence's text is recognised, by the hub's name of the licence."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_TEXT = """\
# {title}

{origin} It was compressed with cerwu_gpu {version}: its weight matrices are quantized with a
Hessian-aware, rate-constrained search and entropy coded.

| | original | compressed |
|---|---|---|
| bytes of the weights | {original_bytes:,} | {compressed_bytes:,} |
| bits per quantized weight | | {bits_per_weight:.4f} |
{perplexity}
{weights:,} weights in {matrices} tensors are quantized; the bits count everything that is stored
for them.

## How to load it

```sh
pip install cerwu_gpu
```

```python
{loading}
```

{after}

## Licence

{licence}
"""


_OF_TRANSFORMERS = """\
import cerwu_gpu  # registers the format with transformers
from transformers import {model}, {processor}

name = "..."  # this repository, or a directory with its files
model = {model}.from_pretrained(name)
{variable} = {processor}.from_pretrained(name)"""
_OF_A_MODULE = """\
import cerwu_gpu

name = "..."  # a directory with the files of this repository
model = ...  # a module of the class that was compressed
cerwu_gpu.load_compressed(name, into=model)"""
_DENSE = (
    "The model is an ordinary dense one once it is loaded, and `save_pretrained` writes dense "
    "weights."
)
_RESIDENT = (
    '`cerwu_gpu.load_compressed(name, resident="compressed")` keeps its blocks compressed in '
    "memory."
)


@dataclass(frozen=True)
class Loader:
    """Instructions for loading a kind of model, for its card.

    Attributes:
        title: the kind, without its article.
        tag: the Hub's name of its task.
        model, processor: classes of transformers.
        blocks: whether its blocks can stay compressed in memory.
    """

    title: str
    tag: str
    model: str
    processor: str
    blocks: bool

    def instructions(self) -> tuple[str, str]:
        """Return code that loads it, and a paragraph about what is loaded."""
        variable = "tokenizer" if self.processor == "AutoTokenizer" else "processor"
        code = _OF_TRANSFORMERS.format(
            model=self.model, processor=self.processor, variable=variable
        )
        return code, f"{_DENSE}\n{_RESIDENT}" if self.blocks else _DENSE


@dataclass(frozen=True)
class Quality:
    """The model before and after, on text that did not calibrate it.

    Attributes:
        original, compressed: perplexity of either.
        tokens: number of predicted tokens.
    """

    original: float
    compressed: float
    tokens: int


@dataclass(frozen=True)
class Card:
    """Provenance that the directory itself does not record.

    Attributes:
        base_model: hub name of the original, None where there is none.
        source: licence and language of the original, by the names of the hub's metadata; see
            CARRIED_OVER.
        original_bytes: of the original's weights.
        text: public names of the calibration texts; None: one of them has none.
        loader: instructions for loading its kind; None: a plain module.
    """

    base_model: str | None
    source: dict[str, Any]
    original_bytes: int
    text: str | None = None
    loader: Loader | None = None

    def write_judged(
        self, folder: Path, before: float | None, after: float | None, *, predictions: int
    ) -> None:
        """Write README.md into `folder`, with the perplexities of the original and the compressed
        model where their mean losses [nats] over `predictions` tokens are known."""
        quality = None
        if before is not None and after is not None and predictions:
            quality = Quality(perplexity_of(before), perplexity_of(after), predictions)
        self.write(folder, quality)

    def write(self, folder: Path, quality: Quality | None = None) -> None:
        """Write README.md into the complete compressed directory `folder`."""
        related: dict[str, Any] = {"base_model_relation": "quantized"} if self.base_model else {}
        data = ModelCardData(
            base_model=self.base_model,
            library_name="transformers" if self.loader else "cerwu_gpu",
            pipeline_tag=None if self.loader is None else self.loader.tag,
            tags=["cerwu", "compressed", "entropy-coding"],
            **related,
            **self.source,
        )
        text = f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{self._body(folder, quality)}"
        (folder / CARD_FILE).write_text(text, encoding="utf-8", newline="\n")

    def _body(self, folder: Path, quality: Quality | None) -> str:
        tensors = inventory(folder).tensors
        quantized = [tensor for tensor in tensors if tensor.quantizer is not None]
        weights = sum(tensor.weights for tensor in quantized)
        kind = "module" if self.loader is None else self.loader.title
        code, paragraph = (_OF_A_MODULE, "") if self.loader is None else self.loader.instructions()
        if self.base_model is None:
            title, origin = f"Compressed {kind}", f"This is a compressed {kind}."
        else:
            title = f"{self.base_model.rpartition('/')[2]}, compressed"
            link = f"[{self.base_model}](https://huggingface.co/{self.base_model})"
            origin = f"This is {link}, compressed."
        return _TEXT.format(
            title=title,
            origin=origin,
            version=__version__,
            original_bytes=self.original_bytes,
            compressed_bytes=sum(tensor.bytes for tensor in tensors),
            bits_per_weight=8 * sum(tensor.bytes for tensor in quantized) / weights,
            perplexity="" if quality is None else self._perplexity(quality),
            weights=weights,
            matrices=len(quantized),
            licence=self._licence(),
            loading=code,
            after=paragraph,
        )

    def _perplexity(self, quality: Quality) -> str:
        text = "the calibration text" if self.text is None else self.text
        what = f"perplexity on {quality.tokens:,} tokens of {text} that did not calibrate it"
        return f"| {what} | {quality.original:.2f} | {quality.compressed:.2f} |\n"

    def _licence(self) -> str:
        licence = self.source.get("license_name", self.source.get("license"))
        if licence is None:
            return "The weights are under the licence of the original, which was not found with it."
        shown = licence if _PLAIN_NAME.fullmatch(licence) else _escaped(licence)
        return f"The weights are under the licence of the original: {shown}."


def _is_plain(name: str, value: object) -> bool:
    """Return whether a field of a card is a short text; languages may be a list of such."""
    texts = value if isinstance(value, list) and name == "language" else [value]
    return all(isinstance(x, str) and len(x) <= LONGEST_FIELD and x.isprintable() for x in texts)


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, without HTML and links."""
    return re.sub(r"([\\`*_{}\[\]()#|!~:/])", r"\\\1", html.escape(text))


def card_of(
    model: str | Path | nn.Module,
    files: Path | None,
    original_bytes: int,
    calibration: Sequence[str] | None = None,
    loader: Loader | None = None,
) -> Card:
    """Return the card of a compressed `model`.

    Args:
        model: as `compress` takes it.
        files: local directory of the original, None where there is none.
        original_bytes: of the original's weights.
        calibration: names of the calibration texts; None: not all have one.
        loader: instructions for loading the kind of model; None: a plain module.
    """
    source = {} if files is None else _carried_over(files)
    return Card(_base_model(model), source, original_bytes, _public_names(calibration), loader)


def _public_names(calibration: Sequence[str] | None) -> str | None:
    """Return the datasets' names on the hub; None for files and given strings, which have none."""
    if calibration is None or any(local_path(name).exists() for name in calibration):
        return None
    known = {SELF: "text sampled from the original", **SHORT_NAMES}
    return " and ".join(known.get(name, name) for name in calibration)


def _base_model(model: str | Path | nn.Module) -> str | None:
    """Return the hub name of a model, given or in its configuration; None for a path."""
    name = str(model.config.name_or_path if isinstance(model, PreTrainedModel) else model)
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def _carried_over(files: Path) -> dict[str, Any]:
    """Return licence and language from the original's card, else the licence of its file."""
    card = files / CARD_FILE
    if card.is_file() and lies_inside(card, files):
        try:
            content = read_text(card)
            original: Any = ModelCard(content, ignore_metadata_errors=True)
            fields = original.data.to_dict()
        except Exception:  # no metadata, or none that a parser beneath can read
            fields = {}
        if isinstance(fields.get("license"), str):
            return {n: fields[n] for n in CARRIED_OVER if _is_plain(n, fields.get(n))}
    found = sorted(path for pattern in _LICENCE_FILES for path in files.glob(pattern))
    licences = [path for path in found if lies_inside(path, files)]
    if not licences:
        return {}
    try:
        with opened(licences[0]) as file:
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    for licence, phrases in _LICENCES.items():
        if all(phrase in text for phrase in phrases):
            return {"license": licence}
    return {"license": "other", "license_name": "see-file", "license_link": licences[0].name}
