"""Encoder-decoders, and language models whose blocks cannot run one by one, through every door."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    Gemma3nTextConfig,
    PreTrainedModel,
    T5Config,
    WhisperConfig,
)

import cerwu_gpu
from cerwu_gpu import Batches, Calibration, CompressionConfig, Objective, Text
from cerwu_gpu.config import Distillation, MaxPerplexityIncrease
from cerwu_gpu.errors import CerwuError, ModelError
from cerwu_gpu.hf.classifier import WholeModel
from cerwu_gpu.hf.kinds import kind_of
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.whole_text import SequenceToSequence, WholeLM, token_losses
from tests.configs import check_resumed
from tests.conftest import TEXT

BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SOUND: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 40}
NAMES = ("t5", "bart", "whisper")


def toy(name: str, words: int) -> PreTrainedModel:
    """An encoder-decoder, float32, in eval mode; the same weights every time."""
    t5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    t5["decoder_start_token_id"] = 0
    settings: Any = {
        "t5": lambda: T5Config(**t5, vocab_size=words),
        "bart": lambda: BartConfig(**BART, vocab_size=words, max_position_embeddings=64),
        "whisper": lambda: WhisperConfig(**BART, **SOUND, vocab_size=words),
    }[name]()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: PreTrainedModel = auto_of(name).from_config(settings)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def auto_of(name: str) -> Any:
    return AutoModelForSpeechSeq2Seq if name == "whisper" else AutoModelForSeq2SeqLM


def calibration(name: str, tokenizer: Any) -> Any:
    """Text, or for Whisper audio features with the decoder's tokens."""
    if name != "whisper":
        return Calibration(
            source=Text(TEXT * 8), tokenizer=tokenizer, samples=6, sequence_length=32, batch_size=2
        )
    generator = torch.Generator().manual_seed(3)
    batches = [
        {
            "input_features": torch.randn(2, 8, 20, generator=generator),
            "decoder_input_ids": torch.randint(5, 300, (2, 12), generator=generator),
        }
        for _ in range(3)
    ]
    return Batches(inputs=batches, tokenizer=tokenizer)


def config(name: str, tokenizer: Any, **settings: Any) -> CompressionConfig:
    settings.setdefault("objective", Objective(lmbda=1e-7))
    return CompressionConfig(calibration=calibration(name, tokenizer), **settings)


def logits(model: Any) -> torch.Tensor:
    target = torch.arange(5, 35)[None]
    source: dict[str, Any] = {"input_ids": torch.arange(40, 60)[None]}
    if model.main_input_name == "input_features":
        source = {"input_features": torch.linspace(-1, 1, 160).view(1, 8, 20)}
    with torch.no_grad():
        result: torch.Tensor = model(**source, decoder_input_ids=target, use_cache=False).logits
    return result


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_through_every_door(name: str, toy_tokenizer: Any, tmp_path: Path) -> None:
    model, source, out = toy(name, len(toy_tokenizer)), tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    toy_tokenizer.save_pretrained(source)
    settings = config(name, None)
    report = cerwu_gpu.compress(source, out, config=settings, card=True, progress=False)
    loaded = cerwu_gpu.load_compressed(out)
    weights = loaded.state_dict()
    cerwu_gpu.decompress(out, tmp_path / "dense")
    for path in (out, tmp_path / "dense"):
        other = auto_of(name).from_pretrained(path)
        assert type(other) is type(model)
        assert torch.equal(logits(other), logits(loaded))
        assert all(torch.equal(x, weights[key]) for key, x in other.state_dict().items())
    resident = cerwu_gpu.load_compressed(out, resident="compressed")
    assert torch.equal(logits(resident), logits(loaded))
    assert not torch.equal(logits(model), logits(loaded))
    names = {layer.name for layer in report.layers}
    for part in ("encoder.", "decoder."):
        assert any((part in x and "ttention" in x) or "attn" in x for x in names)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert any("shared" in x or "embed_tokens" in x for x in names) is tied
    assert report.events == ()
    assert auto_of(name).__name__ in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_an_interrupted_run_is_continued(name: str, toy_tokenizer: Any, tmp_path: Path) -> None:
    def run(out: Path) -> None:
        model = toy(name, len(toy_tokenizer))
        # In sequence, every input is a block of its own.
        given = config(name, toy_tokenizer, drift="sequential")
        cerwu_gpu.compress(model, out, config=given, progress=False)

    check_resumed(run, tmp_path)


def adapter_of(name: str, tokenizer: Any, **settings: Any) -> SequenceToSequence:
    loaded = LoadedModel(toy(name, len(tokenizer)), tokenizer, None)
    return SequenceToSequence(loaded, config(name, tokenizer, **settings))


def test_its_inputs_are_the_halves_of_windows(toy_tokenizer: Any) -> None:
    adapter = adapter_of("bart", toy_tokenizer)
    given: Any = adapter.batches[0]
    assert given["input_ids"].shape == (2, 16)
    assert given["decoder_input_ids"].shape == (2, 17)
    assert bool((given["decoder_input_ids"][:, 0] == 1).all())  # the model's start token
    whole = torch.cat([given["input_ids"], given["decoder_input_ids"][:, 1:]], dim=1)
    assert bool((whole[:, 0] == toy_tokenizer.bos_token_id).all())
    ids = torch.tensor(toy_tokenizer(TEXT * 8, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // 31 * 31].view(-1, 31)
    assert all(bool((windows == row[1:]).all(dim=1).any()) for row in whole)


def test_squared_gradients_are_those_per_token() -> None:
    output = torch.randn(2, 5, 7, requires_grad=True)
    ids, labels = torch.randint(7, (2, 6)), torch.tensor([[1, 2, -100, 3, 4], [-100, 1, 1, 1, 1]])
    expected = [
        functional.cross_entropy(logits[row != -100], row[row != -100], reduction="sum") / 2
        for logits, row in zip(output, labels, strict=True)
    ]
    losses = token_losses((output,), {"labels": labels})
    torch.testing.assert_close(losses, torch.stack(expected))
    expected = [
        functional.cross_entropy(logits[:-1], row[1:5], reduction="sum") / 2
        for logits, row in zip(output, ids, strict=True)
    ]
    losses = token_losses((output,), {"decoder_input_ids": ids[:, :5]})
    torch.testing.assert_close(losses, torch.stack(expected))


def test_rows_of_a_tied_head_count_alike(toy_tokenizer: Any) -> None:
    adapter, given = adapter_of("t5", toy_tokenizer), config("t5", toy_tokenizer)
    known = adapter.sensitivities(given).squared_gradients
    plain = WholeModel.sensitivities(adapter, given).squared_gradients
    shared = known["shared.weight", 0]
    assert float(shared.min()) == float(shared.max()) > 0
    torch.testing.assert_close(shared.mean(), plain["shared.weight", 0].mean())
    assert plain["shared.weight", 0].unique().numel() > 1
    assert all(torch.equal(x, plain[key]) for key, x in known.items() if "shared" not in key[0])


def test_its_loss_is_that_of_a_held_out_token(toy_tokenizer: Any) -> None:
    adapter = adapter_of("t5", toy_tokenizer, target=MaxPerplexityIncrease(0.2))
    (held_out,) = adapter._held_out
    batch: Any = held_out
    assert len(adapter.batches) == 2
    with torch.no_grad():
        logits = adapter.module(**batch).logits
    targets = batch["decoder_input_ids"][:, 1:]
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    assert adapter.loss() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("whisper", {"calibration": Calibration(source=Text(TEXT))}, "takes input_features, no"),
        ("t5", {"calibration": Calibration(source="self")}, "continues no text of its own"),
        ("t5", {"calibration": Batches(inputs=[torch.ones(1, 4).long()])}, "decoder_input_ids or"),
        ("t5", {"distillation": Distillation(steps=2)}, "cannot be distilled"),
    ],
)
def test_what_it_cannot_take_is_refused(
    name: str, settings: dict[str, Any], sentence: str, toy_tokenizer: Any, tmp_path: Path
) -> None:
    model = toy(name, len(toy_tokenizer))
    given = CompressionConfig(**{"calibration": calibration(name, toy_tokenizer), **settings})
    with pytest.raises(CerwuError, match=sentence):
        cerwu_gpu.compress(model, tmp_path / "out", config=given, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_it_is_measured_by_no_perplexity(toy_tokenizer: Any) -> None:
    model = toy("t5", len(toy_tokenizer))
    kind = kind_of(model)
    assert kind is not None and kind.adapter is SequenceToSequence
    with pytest.raises(ModelError, match="has no perplexity"):
        cerwu_gpu.perplexity(model, toy_tokenizer, TEXT, context_length=16)


def gemma3n(words: int) -> PreTrainedModel:
    """Each of its blocks is given an embedding of the text."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    settings = Gemma3nTextConfig(
        **sizes,
        vocab_size=words,
        vocab_size_per_layer_input=words,
        hidden_size_per_layer_input=8,
        num_attention_heads=4,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        laurel_rank=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_a_model_whose_blocks_depend_on_the_text_runs_whole(
    toy_tokenizer: Any, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = gemma3n(len(toy_tokenizer))
    model.save_pretrained(source)
    toy_tokenizer.save_pretrained(source)
    report = cerwu_gpu.compress(source, out, config=config("gemma3n", None), progress=False)
    (event,) = [event for event in report.events if "runs whole" in event]
    assert "arguments that depend on the text" in event
    loaded, tokens = cerwu_gpu.load_compressed(out), torch.arange(5, 35)[None]
    with torch.no_grad():
        logits = loaded(tokens, use_cache=False).logits
        original = model(tokens, use_cache=False).logits
    cerwu_gpu.decompress(out, tmp_path / "dense")
    for path in (out, tmp_path / "dense"):
        other = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            assert torch.equal(other(tokens, use_cache=False).logits, logits)
    assert 0 < float((logits - original).norm() / original.norm()) < 0.3
    in_memory = gemma3n(len(toy_tokenizer))
    batches = Batches(inputs=[torch.arange(60).view(2, 30)] * 2, tokenizer=toy_tokenizer)
    given = CompressionConfig(calibration=batches, objective=Objective(lmbda=1e-6))
    report = cerwu_gpu.compress(in_memory, tmp_path / "memory", config=given, progress=False)
    assert any("runs whole" in event for event in report.events)
    assert cerwu_gpu.perplexity(in_memory, toy_tokenizer, TEXT * 4, context_length=32) > 1


def test_labels_of_a_causal_model_stand_at_their_own_tokens(toy_tokenizer: Any) -> None:
    ids = torch.randint(320, (2, 16))
    batches = Batches(inputs=[{"input_ids": ids, "labels": ids}])
    loaded = LoadedModel(gemma3n(len(toy_tokenizer)), toy_tokenizer, None)
    adapter: Any = WholeLM(loaded, CompressionConfig(calibration=batches))
    logits = torch.randn(2, 16, 320)
    with_labels = token_losses((logits,), adapter.batches[0])
    torch.testing.assert_close(with_labels, token_losses((logits,), {"input_ids": ids}))


def test_its_inputs_are_whole_windows(toy_tokenizer: Any) -> None:
    loaded = LoadedModel(gemma3n(len(toy_tokenizer)), toy_tokenizer, None)
    adapter = WholeLM(loaded, config("gemma3n", toy_tokenizer))
    given: Any = adapter.batches[0]
    assert given["input_ids"].shape == (2, 32)
    logits = torch.randn(2, 32, 5)
    ids = torch.randint(5, (2, 32))
    expected = [
        functional.cross_entropy(rows[:-1], row[1:], reduction="sum") / 31**0.5
        for rows, row in zip(logits, ids, strict=True)
    ]
    torch.testing.assert_close(token_losses((logits,), {"input_ids": ids}), torch.stack(expected))
