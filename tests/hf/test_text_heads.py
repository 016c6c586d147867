"""Classifiers of text and embedding models, through every door."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
)

import cerwu_gpu
from cerwu_gpu import Calibration, CompressionConfig, ModelError, Objective
from cerwu_gpu.config import Distillation, MaxPerplexityIncrease
from cerwu_gpu.errors import CerwuError
from cerwu_gpu.hf.kinds import kind_of
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.text_heads import Embedder, TextClassifier
from tests.configs import check_resumed, toy_calibration
from tests.conftest import TEXT

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "num_labels": 3,
}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
TOYS: dict[str, tuple[Any, Callable[[int], Any]]] = {
    "sequences, bert": (
        AutoModelForSequenceClassification,
        lambda words: BertConfig(**SIZES, vocab_size=words),
    ),
    "sequences, llama": (
        AutoModelForSequenceClassification,
        lambda words: LlamaConfig(**SIZES, vocab_size=words),
    ),
    "tokens, roberta": (
        AutoModelForTokenClassification,
        lambda words: RobertaConfig(**SIZES, vocab_size=words, pad_token_id=1),
    ),
    "embeddings, bert": (AutoModel, lambda words: BertConfig(**SIZES, vocab_size=words)),
    "embeddings, mistral": (
        AutoModel,
        lambda words: MistralConfig(**SIZES, num_key_value_heads=2, vocab_size=words),
    ),
    "embeddings, t5": (AutoModelForTextEncoding, lambda words: T5Config(**T5, vocab_size=words)),
}
each_toy = pytest.mark.parametrize("name", TOYS)
POOLING = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def toy(name: str, words: int) -> PreTrainedModel:
    """A model of this kind, float32, in eval mode; the same weights every time."""
    auto, settings = TOYS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: PreTrainedModel = auto.from_config(settings(words))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def config(tokenizer: Any, **settings: Any) -> CompressionConfig:
    settings.setdefault("objective", Objective(lmbda=1e-9))
    return CompressionConfig(calibration=toy_calibration(tokenizer), **settings)


def output(model: Any) -> torch.Tensor:
    """The logits or the last hidden states for one sequence."""
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(5, 35)[None])[0]
    return result


@each_toy
def test_it_comes_back_through_every_door(name: str, toy_tokenizer: Any, tmp_path: Path) -> None:
    model, source, out = toy(name, len(toy_tokenizer)), tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    toy_tokenizer.save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    settings = cerwu_gpu.from_settings(
        calibration=str(text), samples=6, sequence_length=32, lmbda=1e-9
    )
    report = cerwu_gpu.compress(source, out, config=settings, card=True, progress=False)
    loaded = cerwu_gpu.load_compressed(out)
    weights, logits, auto = loaded.state_dict(), output(loaded), TOYS[name][0]
    cerwu_gpu.decompress(out, tmp_path / "dense")
    for other in (
        auto.from_pretrained(out),
        auto.from_pretrained(tmp_path / "dense"),
        cerwu_gpu.load_compressed(out, resident="compressed"),
    ):
        assert type(other) is type(model)
        # A product of one row and few columns is rounded by where its matrix lies in memory.
        torch.testing.assert_close(output(other), logits, rtol=1e-5, atol=1e-6)
    for other in (auto.from_pretrained(out), auto.from_pretrained(tmp_path / "dense")):
        assert all(torch.equal(x, weights[key]) for key, x in other.state_dict().items())
    original = output(model)
    assert not torch.equal(original, logits)
    assert float((original - logits).norm() / original.norm()) < 0.2
    assert any("embed" in layer.name or "shared" in layer.name for layer in report.layers)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert auto.__name__ in card


@each_toy
def test_in_memory_it_holds_the_weights_of_its_directory(
    name: str, toy_tokenizer: Any, tmp_path: Path
) -> None:
    model = toy(name, len(toy_tokenizer))
    kind = kind_of(model)
    assert kind is not None
    assert kind.adapter is (Embedder if "embeddings" in name else TextClassifier)
    cerwu_gpu.compress(model, tmp_path / "out", config=config(toy_tokenizer), progress=False)
    weights = cerwu_gpu.load_compressed(tmp_path / "out").state_dict()
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["sequences, bert", "embeddings, bert"])
def test_an_interrupted_run_is_continued(name: str, toy_tokenizer: Any, tmp_path: Path) -> None:
    def run(out: Path) -> None:
        model = toy(name, len(toy_tokenizer))
        cerwu_gpu.compress(model, out, config=config(toy_tokenizer), progress=False)

    check_resumed(run, tmp_path)


def adapter_of(name: str, tokenizer: Any, **changes: Any) -> TextClassifier:
    model = toy(name, len(tokenizer))
    for field, value in changes.items():
        setattr(model.config, field, value)
    kind = Embedder if "embeddings" in name else TextClassifier
    return kind(
        LoadedModel(model, tokenizer, changes.get("files")),
        config(tokenizer),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    "changes", [{}, {"problem_type": "multi_label_classification"}, {"problem_type": "regression"}]
)
def test_the_curvature_is_that_of_drawn_labels(
    changes: dict[str, Any], toy_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a random sign of each sample the mean square of the gradient is the diagonal of the
    Fisher information: enough samples tell."""
    monkeypatch.setattr("cerwu_gpu.calibration.sensitivity.TEMPERATURE", 1.0)
    adapter = adapter_of("sequences, bert", toy_tokenizer, **changes)
    logits = torch.randn(1, 3)
    p, tokens = torch.softmax(logits[0], 0), torch.arange(5, 25)[None]
    sigmoid = torch.sigmoid(logits[0])
    expected = {
        None: p - p.square(),
        "multi_label_classification": sigmoid * (1 - sigmoid),
        "regression": torch.ones(3),
    }[changes.get("problem_type")]
    total = torch.zeros(3)
    for number in range(400):
        leaf = logits.clone().requires_grad_()
        drawn = tokens.clone()
        drawn[0, 0] += number  # which seeds the signs
        total += torch.autograd.grad(adapter.total_loss(drawn, leaf), leaf)[0][0].square()
    # Scaled as if each of the 20 tokens had a label.
    torch.testing.assert_close(total / 400, 20 * expected, rtol=0.2, atol=0.0)


@pytest.mark.parametrize(
    ("content", "pooled"),
    [
        ({"pooling_mode": "cls"}, lambda states: states[:, 0]),
        ({"pooling_mode_lasttoken": True}, lambda states: states[:, -1]),
        ({"pooling_mode_mean_tokens": True}, lambda states: states.mean(dim=1)),
        ({"pooling_mode": "max"}, lambda states: states.flatten(0, 1)),
        (None, lambda states: states.flatten(0, 1)),
    ],
)
def test_an_embedding_is_pooled_as_its_directory_says(
    content: Any, pooled: Callable[[Any], Any], toy_tokenizer: Any, tmp_path: Path
) -> None:
    if content is not None:
        module = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
        (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "T"}, module]))
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(content))
    adapter = adapter_of("embeddings, bert", toy_tokenizer, files=tmp_path)
    tokens, states = torch.arange(40).view(2, 20), torch.randn(2, 20, 32).requires_grad_()
    generator = torch.Generator().manual_seed(int(tokens.sum()))
    unit = functional.normalize(pooled(states), dim=1)
    signs = torch.randint(0, 2, unit.shape, generator=generator) * 2 - 1
    expected = (unit * signs).sum() * (40 / len(unit)) ** 0.5
    torch.testing.assert_close(adapter.total_loss(tokens, states), expected)


def test_the_layout_of_sentence_transformers_is_carried(toy_tokenizer: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    toy("embeddings, bert", len(toy_tokenizer)).save_pretrained(source)
    toy_tokenizer.save_pretrained(source)
    modules = [{"idx": 0, "path": "", "type": "T"}, {"idx": 1, "path": "1_Pooling", "type": "P"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    settings = cerwu_gpu.from_settings(
        calibration=str(text), samples=4, sequence_length=32, lmbda=1e-9
    )
    report = cerwu_gpu.compress(source, out, config=settings, progress=False)
    assert json.loads((out / "modules.json").read_text()) == modules
    assert json.loads((out / "1_Pooling" / "config.json").read_text()) == POOLING
    assert report.events == ()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target": MaxPerplexityIncrease(0.1)}, "has no perplexity"),
        ({"distillation": Distillation(steps=2)}, "cannot be distilled"),
        ({"calibration": Calibration(source="self")}, "generates no text"),
    ],
)
def test_what_needs_predicted_tokens_is_refused(
    settings: dict[str, Any], sentence: str, toy_tokenizer: Any, tmp_path: Path
) -> None:
    model = toy("sequences, bert", len(toy_tokenizer))
    given = replace(config(toy_tokenizer), **settings)
    with pytest.raises(CerwuError, match=sentence):
        cerwu_gpu.compress(model, tmp_path / "out", config=given, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["sequences, bert", "embeddings, mistral"])
def test_it_has_no_perplexity(name: str, toy_tokenizer: Any) -> None:
    model = toy(name, len(toy_tokenizer))
    with pytest.raises(ModelError, match="has no perplexity"):
        cerwu_gpu.perplexity(model, toy_tokenizer, TEXT, context_length=16)
