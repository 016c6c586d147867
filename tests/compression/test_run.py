"""From a model to a directory and back, family by family."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cerwu_gpu
from cerwu_gpu import (
    Batches,
    Bits,
    CompressionConfig,
    Objective,
    OutputError,
    TargetError,
    Uniform,
    Values,
)
from cerwu_gpu.config import from_settings, settings
from cerwu_gpu.container.journal import Journal
from cerwu_gpu.container.reader import inventory, open_directory
from cerwu_gpu.errors import CalibrationError, ConfigError, FormatError, ModelError
from cerwu_gpu.serving.loading import _built
from tests.configs import compress_flat, configured
from tests.hf.toys import FAMILIES, toy

FEW: dict[str, Any] = {
    "samples": 4,
    "sequence_length": 32,
    "batch_size": 2,
    "sensitivity": "relative",
}


def run(model: Any, output: Path, tokenizer: Any, text: str, **settings: Any) -> Any:
    options = {k: settings.pop(k) for k in ("hessian_cache", "overwrite") if k in settings}
    config = configured(**{**FEW, "lmbda": 3e-4, **settings})
    return compress_flat(
        model, output, config=config, tokenizer=tokenizer, text=text, progress=False, **options
    )


@pytest.fixture
def text(toy_text: Path) -> str:
    return toy_text.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_weights_and_logits_are_those_in_memory(
    family: str, tmp_path: Path, toy_tokenizer: Any, text: str
) -> None:
    model = toy(family)
    quantizer = "trellis4" if family in ("mixtral", "gpt2", "gpt_neox") else "scalar"
    report = run(model, tmp_path / "out", toy_tokenizer, text, quantizer=quantizer)
    loaded = cerwu_gpu.load_compressed(tmp_path / "out")
    for (name, ours), (_, theirs) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    layers = [layer for layer in report.layers if not layer.events]
    assert all(0 < layer.relative_loss < 0.5 for layer in layers)
    tokens = torch.arange(60).view(2, 30)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert report.directory_bytes == size == inventory(tmp_path / "out").total_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_come_back_in_their_dtype(
    dtype: torch.dtype, tmp_path: Path, toy_tokenizer: Any, text: str
) -> None:
    model = toy("llama").to(dtype)
    run(model, tmp_path / "out", toy_tokenizer, text)
    loaded = cerwu_gpu.load_compressed(tmp_path / "out")
    for name, weight in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], weight)
    wide = cerwu_gpu.load_compressed(tmp_path / "out", dtype=torch.float32)
    assert next(wide.parameters()).dtype == torch.float32


def test_tied_weights_are_stored_once(tmp_path: Path, toy_tokenizer: Any, text: str) -> None:
    model = toy("llama")
    run(model, tmp_path / "out", toy_tokenizer, text)
    names = [entry.name for entry in inventory(tmp_path / "out").tensors]
    assert ("lm_head.weight" in names) + ("model.embed_tokens.weight" in names) == 1
    loaded = cerwu_gpu.load_compressed(tmp_path / "out")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_the_second_run_takes_the_hessians_of_the_first(
    tmp_path: Path, toy_tokenizer: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hessians"
    run(toy("llama"), tmp_path / "first", toy_tokenizer, text, hessian_cache=cache)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("cerwu_gpu.hf.causal_lm.CalibratedBlocks", refuse)
    run(toy("llama"), tmp_path / "second", toy_tokenizer, text, hessian_cache=cache)
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(AssertionError, match="calibrated again"):
        run(toy("gpt2"), tmp_path / "third", toy_tokenizer, text, hessian_cache=cache)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, toy_tokenizer: Any, text: str) -> None:
    for name in ("a", "b"):
        run(toy("mixtral"), tmp_path / name, toy_tokenizer, text, quantizer="trellis8")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_sequential_calibration_sees_the_quantized_blocks(
    tmp_path: Path, toy_tokenizer: Any, text: str
) -> None:
    files = []
    for name, sequential in (("a", False), ("b", True)):
        run(toy("llama"), tmp_path / name, toy_tokenizer, text, sequential=sequential)
        files.append(dict(open_directory(tmp_path / name).weights()))
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(files[0][first], files[1][first])
    assert not torch.equal(files[0][last], files[1][last])


def test_only_the_chosen_layers_are_compressed(
    tmp_path: Path, toy_tokenizer: Any, text: str
) -> None:
    settings = {"include": ("*.mlp.*",), "exclude": ("*.layers.0.*",)}
    model, original = toy("llama"), toy("llama")
    run(model, tmp_path / "out", toy_tokenizer, text, **settings)
    compressed = set(open_directory(tmp_path / "out").compressed())
    wanted = {
        f"model.layers.{i}.mlp.{p}_proj.weight" for i in (1, 2) for p in ("gate", "up", "down")
    }
    assert compressed == wanted
    for name, weight in original.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]) == (name not in wanted)


def test_an_expert_without_tokens_is_named(tmp_path: Path, toy_tokenizer: Any, text: str) -> None:
    model = toy("mixtral")
    router = next(m for n, m in model.named_modules() if n.endswith("gate"))
    with torch.no_grad():
        # Two experts take every token: with zero scores for all, the first ones win.
        router.weight.zero_()
    report = run(model, tmp_path / "out", toy_tokenizer, text)
    named = [event for event in report.events if "no calibration token reached it" in event]
    assert len(named) == 4
    assert all("experts" in event and "[" in event for event in named)
    with pytest.raises(CalibrationError, match=r"\(strict\)"):
        router.weight.data.zero_()
        run(model, tmp_path / "strict", toy_tokenizer, text, strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_wanted_rate_is_met(tmp_path: Path, toy_tokenizer: Any, text: str) -> None:
    report = run(toy("phi"), tmp_path / "out", toy_tokenizer, text, bits=5.0)
    assert report.bits_per_weight == pytest.approx(5.0, abs=0.02)


def test_a_wanted_size_is_never_exceeded(tmp_path: Path, toy_tokenizer: Any, text: str) -> None:
    free = run(toy("phi"), tmp_path / "free", toy_tokenizer, text)
    limit = free.directory_bytes + 2000
    report = run(toy("phi"), tmp_path / "out", toy_tokenizer, text, max_size=limit)
    assert 0.985 * limit <= report.directory_bytes <= limit


def test_a_size_out_of_reach_is_an_error(tmp_path: Path, toy_tokenizer: Any, text: str) -> None:
    with pytest.raises(TargetError, match="max_size 1000 is out of reach"):
        run(toy("phi"), tmp_path / "out", toy_tokenizer, text, max_size=1000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": -1.0}, "lmbda is -1.0"),
        ({"levels": 1}, "levels is 1"),
        ({"samples": 0}, "samples is 0"),
        ({"method": "rtn"}, "rtn rounds to a given grid"),
        ({"method": "gptq"}, "choose one of waterfilled"),
        ({"lmbda": 0.0}, "steps follow from it"),
        ({"bits": 2.0, "max_size": 10}, "keep one of them"),
        ({"bits": 2.0, "levels": 16}, "reached through lmbda"),
        ({"levels": 8, "quantizer": "trellis4"}, "quantizer scalar only"),
        ({"grid": (0.5, 0.5)}, "without repetition"),
        ({"levels": 8, "grid": (0.0, 1.0)}, "keep one of them"),
        ({"damping": float("nan")}, "damping is nan"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(**settings)


def test_settings_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompressionConfig().lmbda = 1.0  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", ["scalar", "trellis8"])
def test_a_gpu_gives_the_bits_of_a_cpu(
    quantizer: str, tmp_path: Path, toy_tokenizer: Any, text: str
) -> None:
    run(toy("mixtral"), tmp_path / "out", toy_tokenizer, text, quantizer=quantizer)
    on_cpu = cerwu_gpu.load_compressed(tmp_path / "out", device="cpu").state_dict()
    on_gpu = cerwu_gpu.load_compressed(tmp_path / "out", device="cuda").state_dict()
    for name, weight in on_cpu.items():
        assert on_gpu[name].device.type == "cuda", name
        assert torch.equal(on_gpu[name].cpu(), weight), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_refused(
    tmp_path: Path, toy_tokenizer: Any, text: str
) -> None:
    run(toy("phi"), tmp_path / "out", toy_tokenizer, text)
    with pytest.raises(ConfigError, match="not here"):
        cerwu_gpu.load_compressed(tmp_path / "out", device="cuda")


def test_a_missing_weight_is_named(tmp_path: Path, toy_tokenizer: Any, text: str) -> None:
    run(toy("llama"), tmp_path / "out", toy_tokenizer, text)
    config = tmp_path / "out" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "num_hidden_layers": 4}))
    with pytest.raises(FormatError, match=r"lacks model\.layers\.3\."):
        cerwu_gpu.load_compressed(tmp_path / "out")
    config.write_text(json.dumps({**content, "hidden_size": -3}))
    with pytest.raises(ModelError, match="cannot build its model"):
        cerwu_gpu.load_compressed(tmp_path / "out")


def test_mixed_dtypes_come_back_one_by_one(tmp_path: Path, toy_tokenizer: Any, text: str) -> None:
    directory = tmp_path / "out"
    run(toy("llama").to(torch.bfloat16), directory, toy_tokenizer, text)
    state = cerwu_gpu.load_compressed(directory).state_dict()
    assert {weight.dtype for weight in state.values()} == {torch.bfloat16}
    mixed = {name: t for name, t in state.items() if name != "lm_head.weight"}
    mixed["model.norm.weight"] = mixed["model.norm.weight"].float() + 1e-4
    built = _built(directory, dict(mixed), None, torch.device("cpu"), False).state_dict()
    for name, weight in mixed.items():
        assert built[name].dtype == weight.dtype
        assert torch.equal(built[name], weight), name


@pytest.mark.gpu
def test_compression_runs_on_a_gpu(tmp_path: Path, toy_tokenizer: Any, text: str) -> None:
    config = configured(samples=4, sequence_length=32, lmbda=1e-5, quantizer="trellis4")
    report = compress_flat(
        toy("llama"),
        tmp_path / "out",
        config=config,
        tokenizer=toy_tokenizer,
        text=text,
        device="cuda",
        progress=False,
    )
    assert report.bits_per_weight > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 1e-30}, "give at least"),
        ({"seed": 2**70}, "seed is"),
        ({"damping": 1e300}, "damping is"),
        ({"grid": (1e39, 2e39), "lmbda": 0.0}, "beyond float32"),
        ({"grid": (0.0, 1e-46), "lmbda": 0.0}, "grid"),
    ],
)
def test_settings_beyond_floats_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(**settings)


def test_settings_come_back_from_what_they_are_written_as() -> None:
    configs = [
        CompressionConfig(),
        CompressionConfig(grid=Uniform(levels=9, method="rtn", scale="per-tensor")),
        CompressionConfig(
            grid=Values(values=(-1.0, 0.0, 1.0), scale="per-tensor", rate_model="gaussian")
        ),
        CompressionConfig(target=Bits(2.5), drift="ignore", keep_head=True, exclude=("*.up*",)),
    ]
    for config in configs:
        assert from_settings(**settings(config)) == config


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"hessian_cache": True}, {}),
        ({"complete_square": False}, {}),
        ({"grid": (-1.0, 0.0, 1.0), "scale": "per-tensor"}, {"grid": (-1.0, 0.0, 1.0)}),
    ],
    ids=["Hessian cache", "completing the square", "scale of a grid"],
)
def test_a_run_is_not_continued_under_other_settings(
    first: dict[str, Any],
    second: dict[str, Any],
    tmp_path: Path,
    toy_tokenizer: Any,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(given: dict[str, Any]) -> None:
        given = dict(given)
        cache = tmp_path / "cache" if given.pop("hessian_cache", False) else None
        run(toy("llama"), tmp_path / "out", toy_tokenizer, text, hessian_cache=cache, **given)

    write, calls = Journal.write, []

    def interrupted(self: Journal, index: int, weights: Any) -> None:
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, index, weights)

    monkeypatch.setattr(Journal, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(first)
    monkeypatch.setattr(Journal, "write", write)
    with pytest.raises(OutputError, match="keeps an unfinished run with"):
        start(second)


def test_a_rate_out_of_reach_is_a_target_error(
    tmp_path: Path, toy_tokenizer: Any, text: str
) -> None:
    with pytest.raises(TargetError, match="bits 60 is out of reach"):
        run(toy("llama"), tmp_path / "out", toy_tokenizer, text, bits=60.0)


def test_tokens_in_batches_calibrate_a_language_model(tmp_path: Path, toy_tokenizer: Any) -> None:
    tokens = torch.randint(5, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    data = Batches(inputs=tokens.split(2), tokenizer=toy_tokenizer)
    objective = Objective(lmbda=1e-5)
    config = CompressionConfig(calibration=data, objective=objective)
    cerwu_gpu.compress(toy("llama"), tmp_path / "out", config=config, progress=False)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    sequential = CompressionConfig(calibration=data, drift="sequential", target=Bits(4.0))
    with pytest.raises(CalibrationError, match="sequential Hessians belong to one setting"):
        cerwu_gpu.compress(toy("llama"), tmp_path / "other", config=sequential, progress=False)
    wrong = CompressionConfig(calibration=Batches(inputs=[torch.randn(2, 3)]))
    with pytest.raises(CalibrationError, match="batches of a language model are tokens"):
        cerwu_gpu.compress(toy("llama"), tmp_path / "other", config=wrong, progress=False)
