"""Models whose blocks stay on disk: the same values, the same files, without the whole model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cerwu_gpu import CompressionConfig, ModelError, compress
from cerwu_gpu.calibration.cache import HessianCache, hessian_key
from cerwu_gpu.calibration.running import placed, state_of, weight_source
from cerwu_gpu.calibration.stack import stack
from cerwu_gpu.compression.estimate import sample_stacks
from cerwu_gpu.compression.run import Run
from cerwu_gpu.config import Batches
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.kinds import load_kind
from cerwu_gpu.hf.models import LoadedModel, is_conv1d, load_model
from cerwu_gpu.hf.streaming import WeightsOnDisk
from cerwu_gpu.hf.text import CalibrationTokens
from cerwu_gpu.models.selection import find_blocks
from cerwu_gpu.progress import Clock
from cerwu_gpu.quantize.sensitivity import Sensitivities
from tests.configs import compress_flat, configured
from tests.hf.toys import FAMILIES, toy, toy_tokens

ROOT = Path(__file__).resolve().parents[2]


def saved(family: str, folder: Path, **changes) -> Path:
    toy(family, **changes).save_pretrained(folder, max_shard_size="40KB")
    return folder


def gguf_file(path: Path) -> Path:
    """A random Llama of two blocks, float32."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("toy")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(320)
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy() * 0.2)

    add("token_embd", 320, 32)
    add("output_norm", 32)
    for block in ("blk.0", "blk.1"):
        add(f"{block}.attn_norm", 32)
        add(f"{block}.ffn_norm", 32)
        for name, rows in {"q": 32, "k": 16, "v": 16, "output": 32}.items():
            add(f"{block}.attn_{name}", rows, 32)
        add(f"{block}.ffn_gate", 48, 32)
        add(f"{block}.ffn_up", 48, 32)
        add(f"{block}.ffn_down", 32, 48)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_streamed(source: Path) -> None:
    """Its values are those of the model in memory, and its matrices are there only while placed."""
    whole = load_model(source).model
    expected = whole.state_dict()
    streamed = load_kind(source, stream=True)[1].model
    assert weight_source(whole) is None and weight_source(streamed) is not None
    values = dict(state_of(streamed))
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert hessian_key(streamed, None, [], "") == hessian_key(whole, None, [], "")
    assert {n: p.dtype for n, p in streamed.named_parameters()} == {
        n: p.dtype for n, p in whole.named_parameters()
    }
    for name, block in find_blocks(streamed, is_conv1d):
        away = [n for n, p in block.named_parameters() if p.is_meta]
        assert away == [n for n, p in block.named_parameters() if p.dim() > 1]
        with placed(block, torch.device("cpu")):
            assert all(torch.equal(p, expected[f"{name}.{n}"]) for n, p in block.named_parameters())
        assert [n for n, p in block.named_parameters() if p.is_meta] == away
    outside = [p for n, p in streamed.named_parameters() if not p.is_meta]
    assert outside and all(torch.isfinite(p).all() for p in outside)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_on_disk_has_the_values_of_the_one_in_memory(family, tmp_path):
    check_streamed(saved(family, tmp_path))


def test_tensors_are_cast_as_transformers_casts_them(tmp_path):
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    check_streamed(tmp_path)


def test_a_gguf_file_is_read_block_by_block(tmp_path):
    check_streamed(gguf_file(tmp_path / "toy.gguf"))


def test_what_is_written_into_a_block_is_gone_when_it_is_placed_again(tmp_path):
    model = load_kind(saved("llama", tmp_path), stream=True)[1].model
    _, block = find_blocks(model)[0]
    with placed(block, torch.device("cpu")), torch.no_grad():
        original = block.mlp.up_proj.weight.clone()
        block.mlp.up_proj.weight.zero_()
        with placed(block, torch.device("cpu")):
            assert not block.mlp.up_proj.weight.any()
    with placed(block, torch.device("cpu")):
        assert torch.equal(block.mlp.up_proj.weight, original)


SETTINGS = {
    "sensitivities, drift and head": {},
    "rows": {"sensitivity": "row", "drift": "ignore"},
    "without gradients": {"sensitivity": "none", "drift": "sequential"},
    "some weights": {"exclude": ("*.0.*", "*down_proj*"), "keep_head": True},
}


def compressed(model, output: Path, **settings) -> dict[str, bytes]:
    """The files of a compressed directory that hold weights and configuration."""
    config = configured(**{"lmbda": 1e-6, **settings})
    compress_flat(model, output, config=config, batches=[toy_tokens(8)], progress=False)
    return {
        path.name: path.read_bytes()
        for path in output.iterdir()
        if path.suffix == ".safetensors" or path.name == "config.json"
    }


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_model_on_disk_is_compressed_to_the_same_bytes(settings, tmp_path):
    source = saved("llama", tmp_path / "model")
    streamed = compressed(source, tmp_path / "streamed", **settings)
    assert streamed == compressed(load_model(source).model, tmp_path / "whole", **settings)


def passes(model, folder: Path) -> tuple[list[float | None], dict[str, bytes]]:
    """The held-out losses of the original and after each of two passes; the second's files."""
    config = configured(lmbda=1e-3, sensitivity="none", drift="ignore")
    adapter = CausalLM(LoadedModel(model, None, None), config, device=torch.device("cpu"))
    adapter.take(CalibrationTokens(toy_tokens(6), toy_tokens(2)))
    losses = [adapter.loss()]
    (folder / "work").mkdir(parents=True)
    adapter.keep_originals()
    with Run(adapter, folder / "small", clock=Clock(), work=folder / "work") as run:
        for lmbda in (1e-3, 1e-6):
            attempt = run.attempt(config.at(lmbda))
            losses.append(adapter.loss())
        folder = attempt.writer.folder
        return losses, {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_each_pass_begins_with_the_original_weights_and_ends_with_the_quantized(tmp_path):
    source = saved("llama", tmp_path / "model")
    streamed = passes(load_kind(source, stream=True)[1].model, tmp_path / "streamed")
    assert streamed == passes(load_model(source).model, tmp_path / "whole")
    original, coarse, fine = streamed[0]
    assert original != fine != coarse


def test_an_estimate_sees_the_weights_of_models_on_disk(tmp_path):
    source = saved("llama", tmp_path / "model")
    config = configured(sensitivity="none", drift="ignore")
    samples = []
    for model in (load_model(source).model, load_kind(source, stream=True)[1].model):
        adapter = CausalLM(LoadedModel(model, None, None), config, device=torch.device("cpu"))
        adapter.take(CalibrationTokens(toy_tokens(6), toy_tokens(0)))
        adapter.cache = HessianCache(tmp_path, "key")  # calibrated first, then read
        samples.append(
            sample_stacks(adapter.blocks(config, sampling=True), config, Sensitivities())
        )
    for whole, streamed in zip(*samples, strict=True):
        assert whole.name == streamed.name
        assert torch.equal(whole.weight, streamed.weight)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2"])
def test_converted_and_unusual_weights_are_compressed_to_the_same_bytes(family, tmp_path):
    source = saved(family, tmp_path / "model")
    streamed = compressed(source, tmp_path / "streamed")
    assert streamed == compressed(load_model(source).model, tmp_path / "whole")


def test_a_gguf_file_is_compressed_to_the_same_bytes(tmp_path):
    source = gguf_file(tmp_path / "toy.gguf")
    streamed = compressed(source, tmp_path / "streamed")
    assert streamed == compressed(load_model(source).model, tmp_path / "whole")


def test_a_distillation_sees_the_quantized_weights(tmp_path):
    source = saved("llama", tmp_path / "model")
    settings = {"distill": 2, "distill_learning_rate": 1e-2}
    streamed = compressed(source, tmp_path / "streamed", **settings)
    assert streamed == compressed(load_model(source).model, tmp_path / "whole", **settings)


def test_a_tensor_that_is_missing_is_named_as_for_a_whole_model(tmp_path):
    toy("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {n: x for n, x in tensors.items() if n != name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=f"lacks 1 of the model's weights, among them {name}"):
        load_kind(tmp_path, stream=True)


def test_a_tensor_of_another_shape_is_refused_as_for_a_whole_model(tmp_path):
    toy("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as whole:
        load_model(tmp_path)
    with pytest.raises(ModelError) as streamed:
        load_kind(tmp_path, stream=True)
    assert str(streamed.value) == str(whole.value)


def test_a_model_that_cannot_stay_on_disk_is_an_event(tmp_path):
    model = toy("llama")
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    config = CompressionConfig(calibration=Batches(inputs=[toy_tokens(4)]))
    report = compress(
        tmp_path / "model", tmp_path / "small", config=config, device="cpu", progress=False
    )
    assert "the model is whole in memory, because its weights are in no safetensors files" in (
        report.events
    )


def test_a_model_whose_first_parameter_is_in_a_block_is_read_whole(tmp_path):
    """Its device would be that of a block on disk."""
    toy("llama").save_pretrained(tmp_path)
    before = LlamaForCausalLM.__init__

    def blocks_first(self, *arguments):
        before(self, *arguments)
        embedding = self.model.embed_tokens
        del self.model.embed_tokens
        self.model.embed_tokens = embedding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "__init__", blocks_first)
        loaded = load_kind(tmp_path, stream=True)[1]
    assert weight_source(loaded.model) is None
    assert "a block has its first parameter" in loaded.events[0]


def test_transformers_is_as_it_was_afterwards(tmp_path):
    source = saved("llama", tmp_path)
    load_kind(source, stream=True)
    assert weight_source(load_model(source).model) is None
    assert not any(p.is_meta for p in load_model(source).model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_file", [False, True])
def test_a_stack_gives_back_what_it_was_given_last(dtype, in_file, tmp_path):
    tensors = [torch.randn(2, 3, i).to(dtype) for i in range(4)]
    with stack(tmp_path if in_file else None) as hidden:
        for tensor in tensors:
            hidden.append(tensor)
        assert torch.equal(hidden.pop(), tensors[3])
        hidden.append(tensors[0])
        for tensor in (tensors[0], *reversed(tensors[:3])):
            assert torch.equal(hidden.pop(), tensor)
    assert not list(tmp_path.iterdir())


WALK = """
import argparse, sys
from pathlib import Path
import torch
from cerwu_gpu.calibration.running import placed, state_of, weight_source
from cerwu_gpu.hf.kinds import load_kind
from cerwu_gpu.models.selection import find_blocks
from scripts.streaming_memory import Peak, anonymous_bytes, make

sizes = argparse.Namespace(hidden=1024, intermediate=1024, vocabulary=64)
folder = Path(sys.argv[1])
make(folder, 8, sizes)
model = load_kind(folder, stream=True)[1].model
begin = anonymous_bytes()
with Peak() as peak, torch.no_grad():
    assert all(bool(value.isfinite().all()) for _, value in state_of(model))
    for name, block in find_blocks(model):
        with placed(block, torch.device("cpu")):
            for parameter in block.parameters():
                parameter.mul_(0.5)
    with weight_source(model).running():
        model(input_ids=torch.arange(8)[None])
print(peak.bytes - begin)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_anonymous_memory_holds_one_block_at_a_time(tmp_path):
    command = [sys.executable, "-c", WALK, str(tmp_path / "model")]
    run = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    block = 4 * 7 * 1024**2
    assert 0.5 * block < int(run.stdout.split()[-1]) < 3 * block  # there are eight


def test_no_two_blocks_are_in_memory_at_once(tmp_path, monkeypatch):
    source = saved("llama", tmp_path / "model")
    fill, present = WeightsOnDisk._fill, []

    def counted(disk, index, device):
        versions = fill(disk, index, device)
        blocks = [block for _, block in find_blocks(disk._model)]
        present.append([i for i, x in enumerate(blocks) if not x.mlp.up_proj.weight.is_meta])
        return versions

    monkeypatch.setattr(WeightsOnDisk, "_fill", counted)
    compressed(source, tmp_path / "small")
    assert {tuple(blocks) for blocks in present} == {(0,), (1,), (2,)}


def test_an_overflow_of_float16_is_noticed_by_blocks_from_disk(tmp_path):
    model = toy("llama", tie_word_embeddings=False).half()
    for head, count in ((None, 0), (6e4, 1)):
        with torch.no_grad():
            model.lm_head.weight.fill_(head or 0.1)
        source = tmp_path / f"model-{head}"
        model.save_pretrained(source)
        config = configured(lmbda=1e-6, sensitivity="none", keep_head=True)
        batches = [toy_tokens(8)]
        report = compress_flat(
            source, tmp_path / f"small-{head}", config=config, batches=batches, progress=False
        )
        assert sum("overflows float16" in event for event in report.events) == count


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_memory_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hf.memory_of_layers", str(tmp_path), "2", "8"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    few, many = json.loads(done.stdout.splitlines()[-1])
    assert abs(many - few) < 10 * 2**20  # half a MB; 28 where freed memory is not given back
