"""Image classifiers on the command line: images calibrate, judge, and are the subject of sweeps."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cerwu_gpu import CompressionConfig, ImageCalibration, compress
from cerwu_gpu.errors import CalibrationError, ConfigError, ModelError
from cerwu_gpu.hf.images import load_images
from tests.hf.toys import toy as language_model
from tests.models.toys import SIDE, save_classifier, save_pictures, toy

pytest.importorskip("PIL", reason="images need pillow")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Images of two classes, eight for training and six for testing."""
    save_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A toy classifier with its image processor."""
    save_classifier(tmp_path / "model")
    return tmp_path / "model"


def test_images_are_split_processed_and_numbered(pictures: Path, model: Path) -> None:
    labels = {"gull": 5, "boat": 3}
    images = load_images(str(pictures), model, part="evaluation", labels=labels, batch_size=4)
    assert [tuple(batch.shape) for batch in images.batches] == [
        (4, 3, SIDE, SIDE),
        (2, 3, SIDE, SIDE),
    ]
    assert images.labels is not None
    assert sorted(torch.cat(images.labels).tolist()) == [3, 3, 3, 5, 5, 5]
    assert float(torch.cat(images.batches).abs().max()) <= 1.0
    few = load_images(str(pictures), model, part="calibration", count=3, seed=1)
    again = load_images(str(pictures), model, part="calibration", count=3, seed=1)
    assert torch.equal(few.batches[0], again.batches[0]) and len(few.batches[0]) == 3


def test_what_is_no_image_is_one_sentence(pictures: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no class 'boat'"):
        load_images(str(pictures), model, part="evaluation", labels={"gull": 1})
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        load_images(str(tmp_path / "nowhere"), model, part="evaluation")
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="has no image processor"):
        load_images(str(pictures), model, part="evaluation")


def test_a_classifier_is_compressed_and_judged(
    pictures: Path, model: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    small = tmp_path / "small"
    images = ("--images", pictures, "--quiet")
    code, out, err = command(
        "compress",
        model,
        "-o",
        small,
        *images,
        "--lmbda",
        "1e-7",
        "--samples",
        "6",
        "--card",
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["bits_per_weight"] > 2
    assert "image-classification" in (small / "README.md").read_text(encoding="utf-8")
    assert (small / "preprocessor_config.json").is_file()
    report = json.loads((tmp_path / "small.report.json").read_text(encoding="utf-8"))
    assert report["settings"]["images"] == str(pictures)
    assert shlex.split(report["command"])[:4] == ["cerwu-gpu", "compress", str(model), "-o"]
    again = [word for word in shlex.split(report["command"])[1:] if word != str(small)]
    again.insert(again.index("-o") + 1, str(tmp_path / "again"))
    assert command(*again, "--quiet")[0] == 0
    weights = [tmp_path / name / "model.safetensors" for name in ("small", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    code, out, err = command("eval", small, "--against", model, *images, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["images"] == 6
    assert 0 <= result["accuracy"] <= 1 and result["kl_divergence"] >= 0
    assert result["top1_agreement"] > 0.5
    code, out, err = command("eval", small, *images)
    assert code == 0 and "accuracy" in out, err


def test_a_sweep_runs_on_a_classifier(
    pictures: Path, model: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    grid = ("--methods", "waterfilled,rtn", "--lmbda", "1e-7", "--levels", "15", "--samples", "6")
    code, out, err = command(
        "sweep", model, "-o", tmp_path / "sweep", "--images", pictures, *grid, "--quiet"
    )
    assert code == 0, err
    assert "accuracy" in out and "waterfilled" in out


def test_images_are_for_classifiers_in_directories(
    pictures: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    config = CompressionConfig(calibration=ImageCalibration(source=str(pictures)))
    with pytest.raises(ConfigError, match="is in memory, without an image processor"):
        compress(toy("resnet"), tmp_path / "out", config=config, progress=False)
    language_model("llama").save_pretrained(tmp_path / "language")
    code, _, err = command(
        "compress", tmp_path / "language", "-o", tmp_path / "out", "--images", pictures, "--quiet"
    )
    assert code == 2 and "is a causal language model: images are for classifiers and vision" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("compress", "MODEL", "-o", "x", "--sequence-length", "64"), "sequence_length"),
        (("compress", "MODEL", "-o", "x", "--calibration", "self"), "calibration"),
        (("eval", "MODEL", "--text", "words.txt"), "text is for language models"),
        (("eval", "MODEL", "--stride", "3"), "stride"),
        (("sweep", "MODEL", "-o", "x", "--text", "words.txt"), "text is for language models"),
        (("sweep", "MODEL", "-o", "x", "--max-windows", "3"), "max_windows"),
        (("sweep", "MODEL", "-o", "x", "--head", "quantize,keep"), "head"),
    ],
    ids=str,
)
def test_settings_of_texts_are_refused_beside_images(
    arguments: tuple[str, ...], part: str, model: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    typed = [str(model) if word == "MODEL" else word for word in arguments]
    typed = [str(tmp_path / "x") if word == "x" else word for word in typed]
    code, _, err = command(*typed, "--images", "pictures")
    assert code == 2 and part in err


def test_a_killed_run_of_a_module_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of language models: what is finished is kept, and the bytes are those of one run."""
    from cerwu_gpu import Batches, CompressionConfig, Objective, compress
    from cerwu_gpu.compression import pipeline
    from cerwu_gpu.container.journal import Journal
    from tests.models.toys import images

    config = CompressionConfig(
        calibration=Batches(inputs=images()), objective=Objective(lmbda=1e-4), drift="sequential"
    )
    compress(toy("resnet"), tmp_path / "whole", config=config, progress=False)
    write, calls = Journal.write, []

    def interrupted(self: Journal, index: int, weights: Any) -> None:
        calls.append(index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, index, weights)

    monkeypatch.setattr(Journal, "write", interrupted)
    with pytest.raises(KeyboardInterrupt, match="keeps what is finished"):
        compress(toy("resnet"), tmp_path / "out", config=config, progress=False)
    monkeypatch.setattr(Journal, "write", write)
    searches: list[object] = []
    search = pipeline.quantize_stacks

    def counted(*arguments: Any) -> Any:
        searches.append(arguments)
        return search(*arguments)

    monkeypatch.setattr(pipeline, "quantize_stacks", counted)
    compress(toy("resnet"), tmp_path / "fresh", config=config, progress=False)
    whole, searches[:] = len(searches), []
    compress(toy("resnet"), tmp_path / "out", config=config, progress=False)
    assert len(searches) == whole - 2
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".out.work").exists()


def test_labels_that_do_not_fit_are_refused(pictures: Path, model: Path) -> None:
    with pytest.raises(CalibrationError, match="no class 'boat'"):
        load_images(str(pictures), model, part="evaluation", labels={"cat": 0, "dog": 1})
    unnamed = {"LABEL_0": 0, "LABEL_1": 1}
    images = load_images(str(pictures), model, part="evaluation", labels=unnamed)
    assert images.labels is not None and set(torch.cat(images.labels).tolist()) == {0, 1}


def test_other_pictures_are_another_sweep(
    pictures: Path, model: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    from PIL import Image

    grid = ("--methods", "rtn", "--levels", "15", "--samples", "6", "--quiet")
    start = ("sweep", model, "-o", tmp_path / "sweep", "--images", pictures, *grid)
    assert command(*start).code == 0
    Image.new("RGB", (SIDE, SIDE)).save(pictures / "test" / "boat" / "0.png")
    code, _, err = command(*start)
    assert code == 2 and "evaluation images" in err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pixels_have_the_models_dtype(
    dtype: str, pictures: Path, model: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    toy("resnet").to(getattr(torch, dtype)).save_pretrained(model)
    code, _, err = command(
        *("compress", model, "-o", tmp_path / "small", "--images", pictures),
        *("--lmbda", "1e-6", "--samples", "4", "--quiet"),
    )
    assert code == 0, err
