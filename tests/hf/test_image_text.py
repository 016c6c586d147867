"""Vision-language models calibrated by images and text, made by their own processors."""

import copy
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import cerwu_gpu
from cerwu_gpu import Batches, Calibration, CompressionConfig, ImageTextCalibration, Objective, Text
from cerwu_gpu.config import from_settings, settings
from cerwu_gpu.errors import CerwuError, ConfigError
from cerwu_gpu.hf.image_text import ImagesAndText, image_text_batches
from cerwu_gpu.hf.kinds import load_kind
from cerwu_gpu.hf.whole_text import token_losses
from cerwu_gpu.models import module
from tests.configs import check_resumed
from tests.conftest import TEXT
from tests.hf.test_vision_language import TOYS
from tests.models.toys import save_classifier, save_pictures

pytest.importorskip("PIL", reason="images need pillow")

LENGTH = 24
"""Tokens of a sample; an image takes 4 of them."""
CHAT = (
    "{% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
)
SIZE = {"height": 16, "width": 16}


def words_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A copy of the tokenizer with tokens for images."""
    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<begin>",
            "eoi_token": "<end>",
        },
    )


def processor_of(name: str, words: Any) -> Any:
    if name == "llava":
        images = CLIPImageProcessor(size=SIZE, do_center_crop=False)
        return LlavaProcessor(
            image_processor=images,
            tokenizer=words,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT,
        )
    return Gemma3Processor(Gemma3ImageProcessor(size=SIZE), words, image_seq_length=4)


def save(name: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """Save a toy with its processor; LLaVA has a chat template, Gemma 3 none."""
    words = words_of(tokenizer)
    config = TOYS[name](len(words))
    config.image_token_index = config.image_token_id = words.image_token_id
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor_of(name, words).save_pretrained(folder)
    result: PreTrainedModel = model.eval()
    return result


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder)
    return folder


def calibration(pictures: Path, **changes: Any) -> ImageTextCalibration:
    given: dict[str, Any] = {"source": Text(TEXT * 8), "samples": 10, "batch_size": 4}
    text = Calibration(**{**given, "sequence_length": LENGTH, **changes})
    return ImageTextCalibration(images=str(pictures), text=text)


def config(pictures: Path, **changes: Any) -> CompressionConfig:
    return CompressionConfig(
        calibration=calibration(pictures, **changes), objective=Objective(lmbda=1e-7)
    )


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_sample_is_an_image_and_a_text(
    name: str, pictures: Path, toy_tokenizer: Any, tmp_path: Path
) -> None:
    model = save(name, toy_tokenizer, tmp_path)
    _, loaded = load_kind(tmp_path)
    given = config(pictures)
    batches, events = image_text_batches(loaded, given, calibration(pictures))
    assert events == ()
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    token = model.config.image_token_id
    first, pixels = batches[0]["input_ids"], [batch["pixel_values"] for batch in batches]
    assert all(batch["input_ids"].shape[1] == LENGTH for batch in batches)
    assert (first == token).sum(dim=1).tolist() == [4] * 4
    text = loaded.tokenizer.decode(first[0], skip_special_tokens=True)  # type: ignore[union-attr]
    assert text.strip()[:8] in TEXT * 2
    # Ten samples, eight images: the first two are used again.
    assert torch.equal(torch.cat(pixels)[8:], pixels[0][:2])
    assert not torch.equal(pixels[0][0], pixels[0][1])


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_hessians_are_those_of_a_run_of_the_whole_model(
    name: str, pictures: Path, toy_tokenizer: Any, tmp_path: Path
) -> None:
    model = save(name, toy_tokenizer, tmp_path)
    _, loaded = load_kind(tmp_path)
    given = config(pictures)
    batches, _ = image_text_batches(loaded, given, calibration(pictures))
    adapter = ImagesAndText(loaded, replace(given, calibration=Batches(inputs=batches)))
    wanted = {
        kind: next(n for n in adapter.layouts if kind in n and part in n)
        for kind, part in (("vision", "fc2"), ("language_model", "down_proj"))
    }
    wanted["projector"] = next((n for n in adapter.layouts if "projector" in n), wanted["vision"])
    sums = dict.fromkeys(wanted.values(), torch.zeros(()))
    handles = []
    for weight in set(wanted.values()):

        def hook(_: Any, inputs: Any, weight: str = weight) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[weight] = sums[weight] + 2 / 10 * x.T @ x

        owner = model.get_submodule(weight.removesuffix(".weight"))
        handles.append(owner.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    seen = 0
    for block in adapter.blocks(given):
        for matrix in block.matrices():
            if matrix.name in sums:
                hessian = block.statistics()[matrix.input].hessian
                expected = sums[matrix.name].float()
                assert float(expected.norm()) > 0
                torch.testing.assert_close(hessian, expected, rtol=1e-4, atol=1e-4)
                seen += 1
    assert seen == len(sums)
    known = adapter.sensitivities(given)
    # LLaVA takes the output of the last layer but one: nothing depends on the last one.
    tower = [label for label in known.squared_gradients if "encoder.layers.0" in label[0]]
    assert tower and all(bool(known.squared_gradients[label].any()) for label in tower)


def test_what_stands_for_an_image_counts_in_no_loss() -> None:
    logits, ids = torch.randn(2, 6, 9), torch.randint(8, (2, 6))
    ids[:, 1:4] = 8
    short = torch.cat([logits[:, :1], logits[:, 3:]], dim=1)[:, 1:]
    expected = token_losses((short,), {"input_ids": ids[:, 3:]})
    torch.testing.assert_close(token_losses((logits,), {"input_ids": ids}, 8), expected)


def test_it_is_compressed_loaded_and_repeated(
    pictures: Path, toy_tokenizer: Any, tmp_path: Path, command: Callable[..., Any]
) -> None:
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    save("gemma3", toy_tokenizer, source)
    text.write_text(TEXT * 8, encoding="utf-8")
    words = ("--images", pictures, "--calibration", text, "--sequence-length", LENGTH)
    code, _, err = command(
        "compress", source, "-o", out, *words, "--samples", 6, "--lmbda", "1e-7", "-q"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    assert report["settings"]["images"] == str(pictures)
    # The toy has a head of SigLIP that the model does not use.
    assert report["events"] and all("vision_tower.head" in event for event in report["events"])
    names = {layer["name"] for layer in report["layers"]}
    assert any("vision" in name for name in names) and any("q_proj" in name for name in names)
    loaded: Any = cerwu_gpu.load_compressed(out)
    other = AutoModelForImageTextToText.from_pretrained(out)
    resident: Any = cerwu_gpu.load_compressed(out, resident="compressed")
    _, model = load_kind(source)
    given = calibration(pictures)
    batch = image_text_batches(model, config(pictures), given)[0][0]
    with torch.no_grad():
        logits = [one(**batch).logits for one in (loaded, other, resident, model.model)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert 0 < float((logits[0] - logits[3]).norm() / logits[3].norm()) < 0.5
    again = [word for word in shlex.split(report["command"])[1:] if word != str(out)]
    again.insert(again.index("-o") + 1, str(tmp_path / "again"))
    assert command(*again, "--quiet")[0] == 0
    weights = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_interrupted_run_is_continued(
    pictures: Path, toy_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llava", toy_tokenizer, tmp_path / "source")
    # Little memory for Hessians, so that there is a second group.
    initial = module.ModuleAdapter.__init__
    monkeypatch.setattr(
        module.ModuleAdapter, "__init__", lambda *a, **b: initial(*a, **b, hessian_bytes=1 << 18)
    )
    given = config(pictures, samples=2)
    check_resumed(
        lambda out: cerwu_gpu.compress(tmp_path / "source", out, config=given, progress=False),
        tmp_path,
    )


def test_settings_are_those_of_both() -> None:
    given = from_settings(images="photos", calibration="a.txt", samples=9, sequence_length=64)
    text = Calibration(source="a.txt", samples=9, sequence_length=64)
    assert given.calibration == ImageTextCalibration(images="photos", text=text)
    assert from_settings(**settings(given)) == given
    with pytest.raises(ConfigError, match="calibration none is beside images"):
        from_settings(images="photos", calibration="none", sensitivity="none")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sequence_length": 4}, "an image takes 4 tokens with what stands before it"),
        ({"source": "self"}, "writes no text of its own beside images"),
    ],
)
def test_what_it_cannot_take_is_one_sentence(
    changes: dict[str, Any], sentence: str, pictures: Path, toy_tokenizer: Any, tmp_path: Path
) -> None:
    save("llava", toy_tokenizer, tmp_path / "source")
    with pytest.raises(CerwuError, match=sentence):
        cerwu_gpu.compress(
            tmp_path / "source", tmp_path / "out", config=config(pictures, **changes)
        )
    (tmp_path / "source" / "processor_config.json").unlink()
    (tmp_path / "source" / "preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(CerwuError, match="has no processor of images and text"):
        cerwu_gpu.compress(tmp_path / "source", tmp_path / "out", config=config(pictures))
    assert not (tmp_path / "out").exists()


def test_images_and_text_are_refused_where_there_is_no_tower(
    pictures: Path, toy_directory: Path, tmp_path: Path
) -> None:
    save_classifier(tmp_path / "classifier")
    for model, kind in (
        (toy_directory, "a causal language"),
        (tmp_path / "classifier", "an image"),
    ):
        with pytest.raises(CerwuError, match=f"is {kind}.*not take images and text together"):
            cerwu_gpu.compress(model, tmp_path / "out", config=config(pictures), progress=False)
    assert not (tmp_path / "out").exists()
