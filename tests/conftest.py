"""What the tests share: the device, the seed, poisoned memory, toy models.

Without a GPU kernels run in Triton's interpreter, which is set before triton is imported.
"""

import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on the network
os.environ["TQDM_DISABLE"] = "1"  # the libraries' bars; read when torch imports tqdm
if "PYTEST_XDIST_WORKER" in os.environ:
    # Read by torch; workers would wait for each other's threads.
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy
import pytest
import torch

from cerwu_gpu.cli import main

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GPU = torch.cuda.is_available()
if not GPU:
    assert "triton" not in sys.modules, "TRITON_INTERPRET must be set before triton is imported"
    os.environ["TRITON_INTERPRET"] = "1"

TEXT = (
    "The harbour lies behind a low hill. In the morning the boats come back, and the gulls "
    "follow them. Nobody counts the fish; the scales do that, and the clerk writes 3 numbers down: "
    "the weight, the price and the day. When the wind turns, the ropes sing. "
)
"""A few sentences for calibrating and training toy tokenizers; any length by repetition."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no GPU."""
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU (kernels then run in Triton's interpreter)."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin return nan or the largest integer, so that unwritten output shows."""

    def poison(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def created(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = create(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(tensor.dtype == torch.bool or torch.iinfo(tensor.dtype).max)

        return created

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", poison(torch.empty_strided))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of larger test data, named by the environment variable CERWU_GPU_DATA."""
    folder = os.environ.get("CERWU_GPU_DATA")
    if not folder:
        pytest.skip("CERWU_GPU_DATA does not name a folder of test data")
    path = Path(folder)
    assert path.is_dir(), f"CERWU_GPU_DATA names {folder}, which is no directory"
    return path


@pytest.fixture(scope="session")
def toy_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer of all toy models."""
    return trained_tokenizer()


def trained_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of 320 tokens, trained on TEXT; it can encode any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def toy_directory(
    tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[Path]:
    """A randomly initialised Llama of two blocks and its tokenizer, as save_pretrained writes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(toy_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=toy_tokenizer.bos_token_id,
            eos_token_id=toy_tokenizer.eos_token_id,
        )
    )
    directory = tmp_path_factory.mktemp("toy") / "model"
    model.save_pretrained(directory)
    toy_tokenizer.save_pretrained(directory)
    yield directory


@pytest.fixture(scope="session")
def toy_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TEXT eight times over, in a file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 8, encoding="utf-8")
    return path


class Outcome(NamedTuple):
    code: object
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`cerwu-gpu` with these arguments, in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return Outcome(end.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def compressed(
    toy_directory: Path, toy_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The toy model's compressed directory, and what `compress --json` printed."""
    output = tmp_path_factory.mktemp("compressed") / "small"
    arguments = [
        "compress",
        toy_directory,
        "-o",
        output,
        "--calibration",
        toy_text,
        "--samples",
        "4",
    ]
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--sequence-length", "32", "--quiet", "--json"])
    assert end.value.code == 0
    return output, json.loads(printed.getvalue())
