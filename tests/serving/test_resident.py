"""Blocks that stay compressed in memory: the same numbers, and clear refusals."""

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

import cerwu_gpu
from cerwu_gpu import ConfigError, ModelError
from tests.configs import compress_flat, configured
from tests.hf.toys import toy, toy_tokens

CHEAP: dict[str, Any] = {
    "samples": 2,
    "sequence_length": 16,
    "batch_size": 2,
    "sensitivity": "none",
    "lmbda": 3e-4,
}
FAMILIES = ("llama", "gpt2", "gpt_oss", "gemma3")
"""Tied; transposed weights and a trellis; transposed experts; blocks of two kinds."""


def small(family: str, output: Path, tokenizer: Any, text: Path, **settings: Any) -> Path:
    config = configured(**{**CHEAP, **settings})
    compress_flat(
        toy(family),
        output,
        config=config,
        tokenizer=tokenizer,
        text=text.read_text(encoding="utf-8"),
        progress=False,
    )
    return output


def block_bytes(model: Any) -> int:
    """Bytes of the data behind the parameters of all blocks; a meta tensor has none."""
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.device.type != "meta"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any, toy_text: Path) -> Path:
    return small("llama", tmp_path_factory.mktemp("resident") / "small", toy_tokenizer, toy_text)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_those_of_the_dense_model(
    family: str, tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    quantizer = "trellis4" if family == "gpt2" else "scalar"
    path = small(family, tmp_path / "small", toy_tokenizer, toy_text, quantizer=quantizer)
    dense = cerwu_gpu.load_compressed(path)
    resident = cerwu_gpu.load_compressed(path, resident="compressed")
    tokens = toy_tokens(2)
    with torch.no_grad():
        assert torch.equal(dense(tokens).logits, resident(tokens).logits)
    prompt = {"input_ids": tokens[:1, :8], "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    written = [
        model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        for model in (dense, resident)
    ]
    assert torch.equal(*written)
    assert not resident.training
    assert not resident(tokens).logits.requires_grad


def test_batches_and_pipelines_give_the_text_of_the_dense_model(
    llama: Path, toy_tokenizer: Any
) -> None:
    written: list[Any] = []
    for resident in ("dense", "compressed"):
        model: Any = cerwu_gpu.load_compressed(llama, resident=resident)  # type: ignore[call-overload]
        tokens, mask = toy_tokens(4)[:, :9], torch.ones(4, 9, dtype=torch.int64)
        mask[1, :3] = mask[3, :8] = 0  # shorter prompts, filled up on the left
        options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        batch = model.generate(tokens, attention_mask=mask, **options)
        words = pipeline("text-generation", model=model, tokenizer=toy_tokenizer)
        texts = words(["the gulls follow", "the price"], **options)
        written.append((batch.tolist(), texts))
    assert len({tuple(row) for row in written[0][0]}) == 4
    assert written[0] == written[1]


@pytest.mark.gpu
def test_blocks_decoded_ahead_are_those_of_the_dense_model(llama: Path) -> None:
    """The second stream decodes the next block while this one runs; the first runs after it."""
    dense = cerwu_gpu.load_compressed(llama, device="cuda")
    resident = cerwu_gpu.load_compressed(llama, device="cuda", resident="compressed")
    with torch.no_grad():
        for count in (4, 1, 2):
            tokens = toy_tokens(count).cuda()
            assert torch.equal(resident(tokens).logits, dense(tokens).logits)
    tokens = toy_tokens(2)[:, :8].cuda()
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(resident.generate(tokens, **options), dense.generate(tokens, **options))


def test_a_real_model_gives_the_same_logits(tmp_path: Path, data: Path) -> None:
    source = data / "stories260k"
    config = configured(**{**CHEAP, "lmbda": 1e-7, "calibration": "self"})
    compress_flat(source, tmp_path / "small", config=config, progress=False)
    tokens = torch.arange(3, 99).view(2, 48)
    with torch.no_grad():
        dense = cerwu_gpu.load_compressed(tmp_path / "small")(tokens).logits
        resident = cerwu_gpu.load_compressed(tmp_path / "small", resident="compressed")
        assert torch.equal(resident(tokens).logits, dense)


def test_a_dtype_is_that_of_the_dense_model(llama: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    dense = cerwu_gpu.load_compressed(llama, **options)
    resident = cerwu_gpu.load_compressed(llama, resident="compressed", **options)
    assert resident.dtype == torch.bfloat16
    assert torch.equal(dense(toy_tokens()).logits, resident(toy_tokens()).logits)


def test_one_block_at_a_time_is_decoded_and_none_when_it_has_run(llama: Path) -> None:
    model: Any = cerwu_gpu.load_compressed(llama, resident="compressed")
    at_rest = block_bytes(model)
    norms = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if ".layers." in name and "norm" in name
    )
    assert at_rest == norms
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(block_bytes(model) - at_rest))
    model(toy_tokens())
    dense = cerwu_gpu.load_compressed(llama)
    one = (block_bytes(dense) - norms) // len(model.model.layers)
    assert seen == [one] * len(model.model.layers)
    assert block_bytes(model) == at_rest


def test_gradients_see_the_weights_of_their_own_block(llama: Path) -> None:
    """Later blocks write over a block's weights only where no graph will read them again."""
    gradients = []
    for resident in ("dense", "compressed"):
        model: Any = cerwu_gpu.load_compressed(llama, resident=resident)  # type: ignore[call-overload]
        with torch.no_grad():
            model(toy_tokens())  # leaves memory to be written over
        embedded = model.get_input_embeddings()(toy_tokens()).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)


def test_inference_mode_leaves_nothing_behind_that_others_cannot_use(llama: Path) -> None:
    model: Any = cerwu_gpu.load_compressed(llama, resident="compressed")
    with torch.inference_mode():
        expected = model(toy_tokens()).logits.clone()
    with torch.no_grad():
        assert torch.equal(model(toy_tokens()).logits, expected)
    embedded = model.get_input_embeddings()(toy_tokens()).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None


def test_without_gradients_blocks_share_the_memory_of_one(llama: Path) -> None:
    model: Any = cerwu_gpu.load_compressed(llama, resident="compressed")
    addresses = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda module, *_: addresses.append(module.up_proj.weight.data_ptr())
        )
    with torch.no_grad():
        model(toy_tokens())
        model(toy_tokens())
    assert len(addresses) == 2 * len(model.model.layers)
    assert len(set(addresses)) <= 2


def test_a_failed_forward_leaves_nothing_decoded(llama: Path) -> None:
    model: Any = cerwu_gpu.load_compressed(llama, resident="compressed")
    at_rest = block_bytes(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop here")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        model(toy_tokens())
    assert block_bytes(model) == at_rest
    handle.remove()
    assert torch.equal(
        model(toy_tokens()).logits, cerwu_gpu.load_compressed(llama)(toy_tokens()).logits
    )


def test_the_directory_may_be_gone_once_it_is_loaded(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    path = small("llama", tmp_path / "small", toy_tokenizer, toy_text)
    expected = cerwu_gpu.load_compressed(path)(toy_tokens()).logits
    model = cerwu_gpu.load_compressed(path, resident="compressed")
    (path / "model.safetensors").write_bytes(b"")
    gc.collect()
    assert torch.equal(model(toy_tokens()).logits, expected)


@pytest.mark.parametrize("what", ["save_pretrained", "state_dict", "to", "half", "load_state_dict"])
def test_what_needs_the_weights_is_refused(what: str, llama: Path, tmp_path: Path) -> None:
    model: Any = cerwu_gpu.load_compressed(llama, resident="compressed")
    arguments: dict[str, tuple[Any, ...]] = {
        "save_pretrained": (tmp_path / "saved",),
        "to": (torch.float64,),
        "load_state_dict": ({},),
    }
    with pytest.raises(ModelError, match=r"resident='compressed'.*decompress"):
        getattr(model, what)(*arguments.get(what, ()))
    assert torch.isfinite(model(toy_tokens()).logits).all()


def test_wrong_requests_are_refused(
    llama: Path, tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    with pytest.raises(ConfigError, match="dense or compressed"):
        cerwu_gpu.load_compressed(llama, resident="ram")  # type: ignore[arg-type]
    only = small("llama", tmp_path / "head", toy_tokenizer, toy_text, include=("*embed*",))
    with pytest.raises(ModelError, match="load it dense"):
        cerwu_gpu.load_compressed(only, resident="compressed")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_runs_with_weights_of_its_own(how: str, llama: Path) -> None:
    model = cerwu_gpu.load_compressed(llama, resident="compressed")
    with torch.no_grad():
        expected = model(toy_tokens(2)).logits
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        del model
        gc.collect()
        assert torch.equal(other(toy_tokens(2)).logits, expected)
    assert block_bytes(other) == 4 * 32 * 2 * 3, "norms alone: its blocks are compressed as well"
    with pytest.raises(ModelError, match="moved or cast"):
        other.half()
