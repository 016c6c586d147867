"""vLLM's loader and linear layers without an engine: what is refused, and in which words."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cerwu_gpu import CerwuError, load_compressed
from cerwu_gpu.errors import ConfigError, FormatError
from tests.fuzz import fuzz

pytest.importorskip("vllm.entrypoints", reason="vLLM is not installed: make test-vllm")

from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig

from cerwu_gpu.vllm.loader import CerwuLoader
from cerwu_gpu.vllm.method import CerwuConfig, CompressedLinearMethod, StoredTensor

GOLDEN = Path(__file__).parents[1] / "golden" / "scalar"
COMPRESSED = {"resident": "compressed"}


def described(folder: Path) -> Any:
    """Fields of vLLM's description of a model that the loader reads."""
    return SimpleNamespace(
        model=str(folder),
        quantization="cerwu",
        trust_remote_code=False,
        enforce_eager=False,
        revision=None,
    )


def settings(device: str = "cpu") -> Any:
    return SimpleNamespace(
        device_config=SimpleNamespace(device=device), quant_config=None, additional_config={}
    )


def broken_stream(folder: Path) -> None:
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)


def changed_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")

    return change


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a byte": broken_stream,
    "no shard": lambda folder: (folder / "model.safetensors").unlink(),
    "another size": changed_config(vocab_size=7),
    "more layers": changed_config(num_hidden_layers=3),
    "endless layers": changed_config(num_hidden_layers=10**9),
    "no such model": changed_config(model_type="none"),
    "code": changed_config(
        model_type="its own",
        architectures=["Model"],
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    ),
    "carried": changed_config(quantization_config={"quant_method": "cerwu", "carried": 1}),
}


@pytest.mark.parametrize("extra", [{}, COMPRESSED], ids=["dense", "compressed"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_has_the_verdict_of_load_compressed(
    damage: str, extra: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(GOLDEN, folder)
    DAMAGES[damage](folder)
    with pytest.raises(CerwuError) as ours:
        load_compressed(folder)
    loader = CerwuLoader(LoadConfig(model_loader_extra_config=dict(extra)))
    with pytest.raises(CerwuError) as theirs:
        for _, tensor in loader.get_all_weights(described(folder), nn.Module()):
            tensor.clone()
    assert type(theirs.value) is type(ours.value)
    assert str(theirs.value) == str(ours.value)
    if damage != "a byte":  # the others are seen before vLLM builds the model
        with pytest.raises(CerwuError) as early:
            loader.load_model(settings(), described(folder))
        assert str(early.value) == str(ours.value)


def test_mutations_are_detected_or_do_no_harm(tmp_path: Path) -> None:
    """A sample of what tests/fuzz/fuzz.py does many times."""
    subject = fuzz.Subject("tied", tmp_path, doors=("vllm",))
    outcomes = {number: subject.outcome(number) for number in range(60)}
    good = {"detected", "harmless", "wrong weights"}
    assert {n: found for n, found in outcomes.items() if found[0] not in good} == {}
    assert Counter(what for what, _ in outcomes.values())["detected"] > 30


@pytest.mark.parametrize("extra", [{}, COMPRESSED], ids=["dense", "compressed"])
def test_weights_are_those_of_load_compressed(extra: dict[str, str]) -> None:
    loader = CerwuLoader(LoadConfig(model_loader_extra_config=dict(extra)))
    loaded = dict(loader.get_all_weights(described(GOLDEN), nn.Module()))
    expected = load_compressed(GOLDEN).state_dict()
    stored = [name for name, tensor in loaded.items() if isinstance(tensor, StoredTensor)]
    assert bool(stored) == bool(extra)
    for name, tensor in loaded.items():
        assert torch.equal(tensor.clone(), expected[name])
        assert torch.equal(torch.cat([tensor, tensor]), torch.cat([expected[name]] * 2))


def test_a_directory_that_is_not_compressed_is_refused(tmp_path: Path) -> None:
    load_compressed(GOLDEN).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="it is no compressed model"):
        CerwuLoader(LoadConfig()).load_model(settings(), described(tmp_path))


def test_a_graph_cannot_decode() -> None:
    loader = CerwuLoader(LoadConfig(model_loader_extra_config=dict(COMPRESSED)))
    with pytest.raises(ConfigError, match="--enforce-eager"):
        loader.load_model(settings("cuda"), described(GOLDEN))


def test_other_load_formats_are_refused() -> None:
    current = VllmConfig(load_config=LoadConfig(load_format="npcache"))
    with (
        set_current_vllm_config(current),
        pytest.raises(ConfigError, match="npcache reads no compressed model: use auto"),
    ):
        CerwuConfig().get_quant_method(nn.Linear(2, 2), "layer")


def test_a_layer_without_its_weight_is_an_error() -> None:
    layer, method = nn.Module(), CompressedLinearMethod("layer")
    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig())):
        options: Any = {"weight_loader": lambda *_: None}
        method.create_weights(layer, 4, [2, 2], 4, 4, torch.float32, **options)
        with pytest.raises(ConfigError, match="two layers have the name 'layer'"):
            CompressedLinearMethod("layer").create_weights(
                nn.Module(), 4, [2, 2], 4, 4, torch.float32, **options
            )
    weight: Any = layer.weight
    missing = pytest.raises(FormatError, match="layer: its weight is not in the directory")
    with missing:
        method.process_weights_after_loading(layer)
    weight.weight_loader(weight, torch.zeros(2, 4), 0)
    with missing:
        method.process_weights_after_loading(layer)
    weight.weight_loader(weight, torch.zeros(2, 4), 1)
    method.process_weights_after_loading(layer)
