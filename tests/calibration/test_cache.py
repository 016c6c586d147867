"""Hessians on disk: found again for the same model, text and settings, and for nothing else."""

import pytest
import torch

from cerwu_gpu.calibration import cache
from cerwu_gpu.calibration.cache import CachedBlocks, HessianCache, tensors_digest
from cerwu_gpu.errors import CalibrationError, OutputError
from cerwu_gpu.hf.companions import described
from cerwu_gpu.quantize.sensitivity import Sensitivities
from tests.hf.calibrated import cached_blocks, find_weights
from tests.hf.calibrated import calibrated_blocks as CalibratedBlocks
from tests.hf.toys import toy, toy_tokens


def never():
    raise AssertionError("calibration must not run")


def open_blocks(model, directory, calibrate=None, key="key"):
    layouts = find_weights(model).chosen
    run = calibrate or (lambda: CalibratedBlocks(model, layouts, toy_tokens()))
    return cached_blocks(model, layouts, HessianCache(directory, key), run)


def contents(blocks):
    """All that a pipeline asks of the blocks, with all weights replaced on the way."""
    result = []
    for block in blocks:
        for matrix in block.matrices():
            statistics = block.statistics()[matrix.input]
            hessian, tokens = statistics.hessian.clone(), statistics.tokens
            weight = matrix.weight.clone()
            result.append((block.name, matrix.name, matrix.part, matrix.input, tokens))
            result.append((hessian, weight))
            block.replace(matrix.name, matrix.part, weight.round())
    return result


def same(a, b):
    return all(
        all(map(torch.equal, x, y)) if isinstance(x[0], torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_second_run_gives_the_same_without_calibration(family, tmp_path):
    first, second = toy(family), toy(family)
    blocks = open_blocks(first, tmp_path / "cache")
    assert not isinstance(blocks, CachedBlocks)
    original = contents(blocks)
    again = open_blocks(second, tmp_path / "cache", calibrate=never)
    assert isinstance(again, CachedBlocks)
    assert len(again) == len(blocks) == 3
    assert same(contents(again), original)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert any(bool((p == p.round()).all()) for p in second.parameters() if p.dim() >= 2)


def test_a_run_that_ended_early_is_calibrated_again(tmp_path):
    blocks = iter(open_blocks(toy("llama"), tmp_path))
    next(blocks)
    blocks.close()
    assert [file.name for file in (tmp_path / "key").iterdir()] == ["block-00000.safetensors"]
    again = open_blocks(toy("llama"), tmp_path)
    assert not isinstance(again, CachedBlocks)
    assert len(contents(again)) > 0
    assert isinstance(open_blocks(toy("llama"), tmp_path, calibrate=never), CachedBlocks)


def test_another_key_is_another_cache(tmp_path):
    contents(open_blocks(toy("llama"), tmp_path))
    assert not isinstance(open_blocks(toy("llama"), tmp_path, key="other"), CachedBlocks)


def hessian_key(model, layouts, tokens):
    """The key of an adapter's cache."""
    inputs = "none" if tokens is None else tensors_digest([tokens])
    return cache.hessian_key(model, described(model), list(layouts), inputs)


def test_the_key_depends_on_model_weights_and_text():
    model, tokens = toy("llama"), toy_tokens()
    layouts = find_weights(model).chosen
    key = hessian_key(model, layouts, tokens)
    assert hessian_key(toy("llama"), layouts, toy_tokens()) == key
    changed = toy("llama")
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-6
    other_tokens = tokens.clone()
    other_tokens[0, 0] += 1
    keys = {
        key,
        hessian_key(changed, layouts, tokens),
        hessian_key(toy("llama", rms_norm_eps=1e-3), layouts, tokens),
        hessian_key(toy("llama").to(torch.bfloat16), layouts, tokens),
        hessian_key(model, layouts[1:], tokens),
        hessian_key(model, layouts, other_tokens),
        hessian_key(model, layouts, tokens.view(10, 12)),
        hessian_key(model, layouts, None),
    }
    assert len(keys) == 8
    assert all(len(k) == 64 and set(k) <= set("0123456789abcdef") for k in keys)


def test_the_key_does_not_depend_on_where_the_model_lies(tmp_path):
    model = toy("llama")
    model.save_pretrained(tmp_path / "here")
    again = type(model).from_pretrained(tmp_path / "here")
    keys = {hessian_key(m, find_weights(m).chosen, toy_tokens()) for m in (model, again)}
    assert len(keys) == 1


def test_a_damaged_file_is_named(tmp_path):
    contents(open_blocks(toy("llama"), tmp_path))
    file = tmp_path / "key" / "block-00001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=r"block-00001\.safetensors is damaged: delete"):
        contents(open_blocks(toy("llama"), tmp_path, calibrate=never))


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        contents(open_blocks(toy("llama"), tmp_path / "file"))


def test_nothing_but_whole_files_is_left(tmp_path):
    contents(open_blocks(toy("llama"), tmp_path))
    names = sorted(file.name for file in (tmp_path / "key").iterdir())
    assert names == [f"block-0000{index}.safetensors" for index in range(3)]


@pytest.mark.parametrize("what", ["tensors", "description"])
def test_a_flipped_bit_is_noticed(what, tmp_path):
    """A Hessian with one wrong number would still have a factor, and other weights."""
    contents(open_blocks(toy("llama"), tmp_path))
    file = HessianCache(tmp_path, "key").file(1)
    raw = bytearray(file.read_bytes())
    place = (
        len(raw) // 2 if what == "tensors" else raw.index(b"tokens") + len(b'tokens\\":{\\"') + 1
    )
    raw[place] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CalibrationError, match=r"block-00001.safetensors is damaged: delete"):
        contents(open_blocks(toy("llama"), tmp_path, calibrate=never))


def test_a_flipped_bit_in_the_sensitivities_is_noticed(tmp_path):
    kept = HessianCache(tmp_path, "key")
    kept.write_sensitivities(Sensitivities({("w", 0): torch.rand(1000)}))
    file = tmp_path / "key" / "sensitivities.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 64
    file.write_bytes(raw)
    with pytest.raises(CalibrationError, match="is damaged"):
        kept.read_sensitivities()
