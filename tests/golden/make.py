"""Writes the golden directories of the format and weights.json, the weights that they hold.

    python tests/golden/make.py KIND ...

Every version of cerwu_gpu must decode these directories to the bits
whose SHA-256 weights.json has (docs/format.md, "Versions"). A directory that is there is therefore
never written anew: this script only shows how each was made, and adds kinds.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - the checkout goes on the path before the package is imported
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cerwu_gpu.container.files import format_version
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.files import checksum, dtype_name
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.symbols import QuantizedMatrix
from cerwu_gpu.reference.dequantize import trellis_quantizers
from cerwu_gpu.spec import QUANT_METHOD
from tests.configs import compress_flat, configured

HERE = Path(__file__).resolve().parent
WORDS = 40
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 16,  # bfloat16 experts need rows of whole 16 bytes
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
GRID = (-1.0, -0.45, -0.2, -0.05, 0.0, 0.1, 0.3, 0.7)


def llama(**changes: Any) -> Callable[[], LlamaConfig]:
    return lambda: LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes})


def gpt2() -> GPT2Config:
    return GPT2Config(
        vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=64, bos_token_id=0
    )


@dataclass(frozen=True)
class Golden:
    """One directory: a random model, how it is compressed, and what is special about it.

    Attributes:
        outliers: one weight in so many is made enormous, so that it takes an escape; 0: none.
        shard_bytes: files are cut at this size.
    """

    model: Callable[[], Any]
    dtype: torch.dtype = torch.float32
    settings: dict[str, Any] = field(default_factory=dict)
    outliers: int = 0
    shard_bytes: int = 5_000_000_000


KINDS = {
    "scalar": Golden(llama(), settings={"lmbda": 1e-5}),
    "trellis4": Golden(llama(), torch.bfloat16, {"lmbda": 1e-5, "quantizer": "trellis4"}),
    "trellis8": Golden(llama(), torch.float16, {"lmbda": 1e-5, "quantizer": "trellis8"}),
    "trellis16": Golden(llama(), torch.bfloat16, {"lmbda": 1e-5, "quantizer": "trellis16"}),
    "trellis32": Golden(llama(), torch.float16, {"lmbda": 1e-5, "quantizer": "trellis32"}, 60),
    "escapes": Golden(llama(), settings={"lmbda": 1e-6}, outliers=40),
    "escapes-trellis": Golden(
        llama(), torch.bfloat16, {"lmbda": 1e-6, "quantizer": "trellis8"}, outliers=40
    ),
    "levels": Golden(llama(), settings={"lmbda": 1e-6, "levels": 15}),
    "even-levels": Golden(
        llama(), torch.float16, {"lmbda": 0.0, "levels": 16, "scale": "per-tensor"}
    ),
    "grid": Golden(llama(), torch.bfloat16, {"lmbda": 1e-6, "grid": GRID}),
    "plain-ends": Golden(llama(), torch.bfloat16, {"lmbda": 1e-5, "keep_head": True}),
    "tied": Golden(llama(tie_word_embeddings=True), torch.bfloat16, {"lmbda": 1e-5}),
    "sharded": Golden(llama(num_hidden_layers=2), torch.bfloat16, {"lmbda": 1e-5}, shard_bytes=700),
    "moe": Golden(lambda: MixtralConfig(**EXPERTS), torch.bfloat16, {"lmbda": 1e-5}),
    "moe-transposed": Golden(
        lambda: GptOssConfig(**EXPERTS),
        torch.bfloat16,
        {"lmbda": 1e-5, "quantizer": "trellis4"},
    ),
    "transposed": Golden(gpt2, settings={"lmbda": 1e-5}),
    "streams": Golden(
        llama(hidden_size=64, intermediate_size=200, head_dim=32),
        torch.bfloat16,
        {"lmbda": 1e-7, "quantizer": "trellis8", "include": ("*.mlp.*",)},
    ),
}
"""Kind -> how it was made. "streams" has matrices of several streams, of unequal rows."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for every number below WORDS."""
    words = {str(number): number for number in range(WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="0")


def random_model(golden: Golden) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(golden.model(), dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if golden.outliers and parameter.dim() == 2:
            parameter.data.view(-1)[:: golden.outliers] *= 300.0
    return model.to(golden.dtype).eval()


def make(kind: str) -> dict[str, dict[str, Any]]:
    """Write the directory and return what weights.json says of it."""
    golden = KINDS[kind]
    model = random_model(golden)
    text = " ".join(str(int(word)) for word in torch.randint(WORDS, (2000,)))
    settings = {"samples": 4, "sequence_length": 32, **golden.settings}
    defaults = {**DirectoryWriter.__init__.__kwdefaults__, "shard_bytes": golden.shard_bytes}
    patched = mock.patch.object(DirectoryWriter.__init__, "__kwdefaults__", defaults)
    with TemporaryDirectory() as reports, patched:
        compress_flat(
            model,
            HERE / kind,
            config=configured(**settings),
            tokenizer=tokenizer(),
            text=text,
            device="cpu",
            report=reports,
            progress=False,
        )
    # The model in memory now has the quantized weights: nothing here was read back.
    state = model.state_dict()
    directory = open_directory(HERE / kind)
    names = [*directory.compressed(), *(name for name, _ in directory.plain())]
    return {name: described(state[name]) for name in sorted(names)}


def corner(
    integers: list[list[int]], lowest: int, size: int, *, escapes: int = 0, states: int = 0
) -> QuantizedMatrix:
    """A matrix written down by hand: one class, uneven tables, steps of all sizes."""
    symbols = torch.tensor(integers, dtype=torch.int32)
    rows, columns = symbols.shape
    codes = np.arange(size + escapes, dtype=np.uint8)[None] * 3
    if lowest == -(size // 2) and size % 2:
        codes[:, : size // 2] = codes[:, size - 1 : size // 2 : -1]
    return QuantizedMatrix(
        symbols=symbols,
        lowest=lowest,
        size=size,
        escapes=escapes,
        codes=torch.from_numpy(np.repeat(codes, 2 if states else 1, axis=0)),
        row_class=torch.zeros(rows, dtype=torch.int64),
        column_class=torch.zeros(columns, dtype=torch.int64),
        column_step=torch.linspace(-32768, 32767, columns).to(torch.int16),
        row_scale=torch.linspace(-700, 700, rows).to(torch.int16),
        grid=None,
        states=states,
        second=trellis_quantizers(symbols, states) if states else None,
    )


CORNERS = {
    "one-symbol": (corner([[7, 7, 7], [7, 7, 7]], 7, 1), torch.float32),
    "one-weight": (corner([[-1]], -1, 3), torch.float32),
    "far-escapes": (corner([[0, -(2**30) + 1, 2**30 - 1, 4]], -2, 4, escapes=1), torch.float32),
    "trellis-escapes": (
        corner([[1, -2, 3, -4], [0, 2**30 - 1, -(2**30) + 2, 0]], -1, 2, escapes=2, states=4),
        torch.bfloat16,
    ),
    "tiny-and-huge": (corner([[-2, -1, 0, 1, 2] * 8] * 3, -2, 5), torch.float16),
}
"""Name -> matrix and dtype: alphabets of one symbol, without a mirror; weights that vanish, are
subnormal or infinite in their dtype; a stream without words."""
PLAIN = {
    "plain.int64": torch.tensor([-(2**63), 2**63 - 1]),
    "plain.bool": torch.tensor([[True, False, True]]),
    "plain.uint8": torch.arange(5, dtype=torch.uint8),
    "plain.float64": torch.tensor([1 / 3, float("inf")], dtype=torch.float64),
    "plain.scalar": torch.tensor(2.5),
    "plain.empty": torch.zeros(0, 4),
}


def make_corners() -> dict[str, dict[str, Any]]:
    """A directory that is no model: what compressing one rarely or never brings about."""
    weights = dict(PLAIN)
    with DirectoryWriter(HERE / "corners", generator="golden") as writer:
        for name, (matrix, dtype) in CORNERS.items():
            encoded = encode_matrix(matrix, 0.5)
            writer.add_compressed(
                name,
                shape=tuple(matrix.symbols.shape),
                dtype=dtype,
                transposed=False,
                parts=(encoded.part,),
                words=torch.from_numpy(encoded.words),
                side=torch.frombuffer(bytearray(encoded.side), dtype=torch.uint8),
            )
            weights[name] = matrix.weight(dtype)
        for name, tensor in PLAIN.items():
            writer.add_plain(name, tensor)
        writer.complete()
        content = {
            "quantization_config": {
                "quant_method": QUANT_METHOD,
                "format": format_version(writer.folder),
            }
        }
        (writer.folder / "config.json").write_text(json.dumps(content) + "\n")
        writer.publish()
    return {name: described(weights[name]) for name in sorted(weights)}


CONVOLUTIONS = {
    "plain": ((6, 3, 3, 3), 1, "trellis8"),
    "grouped": ((6, 2, 3, 5), 3, "scalar"),
    "depthwise": ((4, 1, 3, 3), 4, "scalar"),
}
"""Name -> shape of a 2-D convolution's weight, number of groups, quantizer."""


def make_convolutions() -> dict[str, dict[str, Any]]:
    """A directory of convolutions' weights, four axes each."""
    generator = torch.Generator().manual_seed(4)
    weights = {}
    with DirectoryWriter(HERE / "convolutions", generator="golden") as writer:
        for name, (shape, groups, quantizer) in CONVOLUTIONS.items():
            layout = WeightLayout(name, shape, groups, False)
            weight = torch.randn(shape, generator=generator)
            hessian = torch.eye(layout.matrix_shape[1])
            config = configured(lmbda=3e-2, quantizer=quantizer, sensitivity="none")
            coded = []
            for part in range(groups):
                stack = quantize_stack([layout.matrix(weight, part)], hessian, config)
                coded.append(encode_matrix(stack.matrices[0], stack.relative_losses[0]))
                layout.store(weight, part, stack.matrices[0].weight(torch.float32))
            side = b"".join(x.side for x in coded)
            writer.add_compressed(
                name,
                shape=shape,
                dtype=torch.float32,
                transposed=False,
                parts=tuple(x.part for x in coded),
                words=torch.from_numpy(np.concatenate([x.words for x in coded])),
                side=torch.frombuffer(bytearray(side), dtype=torch.uint8),
            )
            weights[name] = weight
        writer.complete()
        content = {
            "quantization_config": {
                "quant_method": QUANT_METHOD,
                "format": format_version(writer.folder),
            }
        }
        (writer.folder / "config.json").write_text(json.dumps(content) + "\n")
        writer.publish()
    return {name: described(weights[name]) for name in sorted(weights)}


def described(tensor: torch.Tensor) -> dict[str, Any]:
    """dtype, shape and the SHA-256 of the bytes, row-major and little-endian."""
    return {
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "sha256": checksum(tensor),
    }


def lines(weights: dict[str, dict[str, dict[str, Any]]]) -> str:
    """JSON with one tensor a line."""
    kinds = []
    for kind, tensors in sorted(weights.items()):
        rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(t)}" for n, t in sorted(tensors.items()))
        kinds.append(f" {json.dumps(kind)}: {{\n{rows}\n }}")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


if __name__ == "__main__":
    file = HERE / "weights.json"
    weights = json.loads(file.read_text()) if file.exists() else {}
    for kind in sys.argv[1:]:
        special = {"corners": make_corners, "convolutions": make_convolutions}
        weights[kind] = special[kind]() if kind in special else make(kind)
        file.write_text(lines(weights))
