"""transformers' own from_pretrained on compressed directories."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import cerwu_gpu
from cerwu_gpu import CorruptionError, ModelError
from cerwu_gpu.container.writer import DirectoryWriter
from tests.configs import compress_flat, configured
from tests.hf.toys import toy, toy_tokens

CHEAP: dict[str, Any] = {
    "samples": 2,
    "sequence_length": 16,
    "batch_size": 2,
    "sensitivity": "none",
    "lmbda": 3e-4,
}
FAMILIES = ("llama", "gpt2", "mixtral", "gpt_oss", "opt_projected", "bloom")
"""Tied; transposed; experts, which transformers converts when it loads; the same transposed; layers
outside the blocks; names with another prefix."""
FRESH = """\
import sys
{imports}
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__name__, "cerwu" in AUTO_QUANTIZATION_CONFIG_MAPPING,
      "cerwu" in AUTO_QUANTIZER_MAPPING, *(type(x).__name__ for x in sys.meta_path))
"""


def small(model: Any, output: Path, tokenizer: Any, text: Path, **settings: Any) -> Path:
    compress_flat(
        model,
        output,
        config=configured(**{**CHEAP, **settings}),
        tokenizer=tokenizer,
        text=text.read_text(encoding="utf-8"),
        progress=False,
    )
    return output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any, toy_text: Path) -> Path:
    path = tmp_path_factory.mktemp("from_pretrained") / "small"
    return small(toy("llama"), path, toy_tokenizer, toy_text)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(toy_tokens(2)).logits
    return result


def same_weights(model: Any, other: Any) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_model_of_load_compressed(
    family: str, tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    quantizer = "trellis4" if family == "gpt2" else "scalar"
    path = small(toy(family), tmp_path / "small", toy_tokenizer, toy_text, quantizer=quantizer)
    ours = cerwu_gpu.load_compressed(path)
    model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found.values())
    assert type(model) is type(ours)
    same_weights(model, ours)
    assert torch.equal(logits(model), logits(ours))
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(ours)
    )


def test_a_saved_model_is_dense_and_says_so(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "dense")
    content = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in content
    assert content["tie_word_embeddings"]
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "dense" / "model.safetensors").stat().st_size > 4 * weights
    plain = toy("llama")  # loads in a transformers that knows nothing of cerwu_gpu
    plain.load_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict())
    same_weights(plain, cerwu_gpu.load_compressed(llama))


def test_a_loaded_model_is_an_ordinary_one(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert not model.is_quantized
    assert getattr(model, "hf_quantizer", None) is None
    assert model.half().dtype == torch.float16
    model.float().train()
    model(toy_tokens(1), labels=toy_tokens(1)).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_tied_weights_stay_tied(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "auto"])
def test_a_dtype_is_that_of_load_compressed(llama: Path, dtype: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).split(".")[-1])
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    same_weights(model, cerwu_gpu.load_compressed(llama, dtype=wanted))


def test_a_half_precision_model_comes_back_as_it_was(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    path = small(toy("llama").to(torch.bfloat16), tmp_path / "small", toy_tokenizer, toy_text)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    same_weights(model, cerwu_gpu.load_compressed(path))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_is_obeyed(llama: Path, device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), logits(cerwu_gpu.load_compressed(llama)))


def test_blocks_may_be_left_on_the_disk(llama: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        llama, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits(model), logits(cerwu_gpu.load_compressed(llama)))


@pytest.mark.gpu
def test_weights_are_decoded_where_they_go(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, device_map="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    same_weights(model.cpu(), cerwu_gpu.load_compressed(llama))


def test_several_files(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DirectoryWriter.__init__.__kwdefaults__, "shard_bytes", 2500)
    path = small(toy("llama"), tmp_path / "small", toy_tokenizer, toy_text)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(model), logits(cerwu_gpu.load_compressed(path)))


def test_the_hub_name_of_a_compressed_repository(llama: Path, tmp_path: Path) -> None:
    """The hub's cache as it is on disk after a download; the tests have no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(llama.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained("someone/small", **options)
    assert torch.equal(logits(model), logits(cerwu_gpu.load_compressed(llama)))
    assert AutoTokenizer.from_pretrained("someone/small", **options)("The day")["input_ids"]


def test_the_model_without_its_head(llama: Path) -> None:
    """Its names have no prefix: layers.0 instead of model.layers.0."""
    body = AutoModel.from_pretrained(llama)
    same_weights(body, cerwu_gpu.load_compressed(llama).model)


@pytest.mark.parametrize("stored", ["words", "plain"])
def test_changed_bytes_are_refused(llama: Path, tmp_path: Path, stored: str) -> None:
    path = tmp_path / "changed"
    shutil.copytree(llama, path)
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    name = "model.norm.weight" if stored == "plain" else "model.layers.1.mlp.up_proj.weight.words"
    first = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]
    content[first] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptionError, match="get it again"):
        AutoModelForCausalLM.from_pretrained(path)


def test_it_does_not_compress(toy_directory: Path) -> None:
    from cerwu_gpu.serving.quantizer import CerwuConfig

    with pytest.raises(ModelError, match=r"cerwu_gpu\.compress"):
        AutoModelForCausalLM.from_pretrained(toy_directory, quantization_config=CerwuConfig())


@pytest.mark.parametrize(
    "imports",
    [
        "import cerwu_gpu\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport cerwu_gpu",
        "import transformers\nimport cerwu_gpu\nfrom transformers import AutoModelForCausalLM",
    ],
    ids=["first", "last", "between"],
)
def test_the_import_is_all_it_takes(llama: Path, imports: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FRESH.format(imports=imports), str(llama)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[:3] == ["LlamaForCausalLM", "True", "True"]
    assert "_RegistryFinder" not in result.stdout
    assert "warn" not in result.stderr.lower(), result.stderr
