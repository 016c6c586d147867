"""Directories that a stranger made: what they may ask for, name and lead to."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cerwu_gpu import CerwuError, FormatError, ModelError, load_compressed
from cerwu_gpu.compression.adapter import Adapter
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.container.breakdown import breakdown
from cerwu_gpu.files import TEXT_LIMIT
from cerwu_gpu.hf.card import card_of
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.companions import copy_files, write_config
from cerwu_gpu.hf.models import LoadedModel, load_model
from cerwu_gpu.serving.loading import decompress, is_compressed, open_model
from tests.fuzz.mutations import Opened
from tests.hf.toys import toy

GOLDEN = Path(__file__).parents[1] / "golden"
ESCAPE = "a\x1b[2J\u202eb"
Change = Callable[[dict[str, Any]], Any]
DOORS: dict[str, Callable[[Path], Any]] = {
    "load_compressed": load_compressed,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
}
doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@pytest.fixture
def golden(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a golden directory."""
    return lambda kind: Path(shutil.copytree(GOLDEN / kind, tmp_path / kind))


def edit(path: Path, change: Change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


LIES: dict[str, tuple[Change, str]] = {
    "more-layers": (lambda c: c.update(num_hidden_layers=3), "lacks model.layers"),
    "fewer-layers": (lambda c: c.update(num_hidden_layers=0), "has model.layers"),
    "other-type": (lambda c: c.update(model_type="qwen2"), "lacks model.layers.0"),
    "other-vocabulary": (lambda c: c.update(vocab_size=7), "has model.embed_tokens.weight as"),
    "other-size": (lambda c: c.update(hidden_size=16), r"the LlamaForCausalLM of its config"),
    "many-layers": (lambda c: c.update(num_hidden_layers=10**7), "num_hidden_layers"),
}


@doors
@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_a_configuration_of_another_model_is_refused(
    door: Callable[[Path], Any],
    change: Change,
    message: str,
    golden: Callable[[str], Path],
) -> None:
    folder = golden("scalar")
    edit(folder / "config.json", change)
    with pytest.raises(FormatError, match=message) as refused:
        door(folder)
    assert len(str(refused.value)) < 300


def test_a_model_far_larger_than_its_files_is_not_built(golden: Callable[[str], Path]) -> None:
    """Below the limit of layers, thousands of them would take minutes."""
    folder = golden("scalar")
    edit(folder / "config.json", lambda c: c.update(num_hidden_layers=9_999))
    with pytest.raises(FormatError, match="far more weights than the files"):
        load_compressed(folder)


@doors
def test_an_index_leads_nowhere_else(
    door: Callable[[Path], Any], golden: Callable[[str], Path]
) -> None:
    folder = golden("sharded")
    other = folder.with_name("B")
    shutil.move(folder, other)
    folder.mkdir()
    for file in other.glob("*.json"):
        shutil.copy(file, folder)

    def elsewhere(index: dict[str, Any]) -> None:
        index["weight_map"] = {n: f"../B/{file}" for n, file in index["weight_map"].items()}

    edit(folder / "model.safetensors.index.json", elsewhere)
    with pytest.raises(FormatError, match="index"):
        door(folder)


@doors
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_code_on_the_hub_is_not_fetched(
    door: Callable[[Path], Any], field: str, golden: Callable[[str], Path]
) -> None:
    folder = golden("scalar")
    edit(folder / "config.json", lambda c: c.update({field: "kernels-community/flash-attn3"}))
    assert "/" not in str(door(folder).config._attn_implementation)


def test_code_on_the_hub_is_not_passed_on(tmp_path: Path) -> None:
    model = toy("llama")
    model.config.attn_implementation = "someone/kernel"
    write_config(LoadedModel(model, None, None), tmp_path)
    assert "someone/kernel" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def giant(path: Path) -> None:
    path.touch()
    os.truncate(path, TEXT_LIMIT + 1)


@pytest.mark.parametrize("make", [pipe, device, giant])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_files_without_an_end_are_not_read(
    name: str, make: Callable[[Path], None], golden: Callable[[str], Path]
) -> None:
    folder = golden("scalar")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    for read in (load_compressed, open_model, load_model):
        with pytest.raises(CerwuError, match=rf"{name}, which is"):
            read(folder)
    assert not is_compressed(folder) or name != "config.json"


@pytest.mark.parametrize("make", [pipe, device, giant])
def test_a_licence_without_an_end_is_an_event(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    make(tmp_path / "source" / "LICENSE")
    events = copy_files(tmp_path / "source", tmp_path / "out", ["LICENSE"])
    assert len(events) == 1
    assert events[0].startswith("LICENSE is not copied")
    assert list((tmp_path / "out").iterdir()) == []


def private(tmp_path: Path) -> Path:
    path = tmp_path / "id_rsa"
    path.write_text("private", encoding="utf-8")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "NOTICE.txt", "tokenizer_config.json", "additional_chat_templates/rag.jinja"],
)
def test_links_out_of_a_source_are_not_followed(name: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(private(tmp_path))
    (source / "LICENSE.md").write_text("free", encoding="utf-8")
    loaded, device = LoadedModel(toy("llama"), None, source), torch.device("cpu")
    with pytest.raises(ModelError, match=rf"{name} is not copied.*\(strict\)"):
        CausalLM(loaded, CompressionConfig(strict=True), device=device)
    adapter = CausalLM(loaded, CompressionConfig(), device=device)
    adapter.write_files(output)
    adapter.write_files(output)
    assert [event for event in adapter.events if name in event] == [
        f"{name} is not copied: it leads out of the model's directory, or is too large"
    ]
    assert sorted(path.name for path in output.iterdir()) == ["LICENSE.md", "config.json"]


def test_a_card_carries_nothing_over_from_a_link(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    outside = tmp_path / "notes.md"
    outside.write_text("---\nlicense: secret\n---\n", encoding="utf-8")
    (source / "README.md").symlink_to(outside)
    (source / "LICENSE").symlink_to(private(tmp_path))
    assert card_of(source, source, 1).source == {}


def snapshot(tmp_path: Path) -> Path:
    """The Hub's cache, in which a snapshot is links to blobs."""
    folder = tmp_path / "models--someone--model" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "4567").write_text("free", encoding="utf-8")
    (folder / "LICENSE").symlink_to("../../blobs/4567")
    return folder


def test_links_into_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert copy_files(snapshot(tmp_path), tmp_path / "out", ["LICENSE"]) == ()
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "free"


def test_a_cache_whose_blobs_lie_elsewhere_is_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    folder = snapshot(tmp_path)
    blobs = folder.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert len(copy_files(folder, tmp_path / "out", ["LICENSE"])) == 1


def test_decompress_follows_no_links_either(
    golden: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = golden("scalar")
    (folder / "LICENSE").symlink_to(private(tmp_path))
    (folder / f"{ESCAPE}.txt").symlink_to(tmp_path / "id_rsa")
    (folder / "notes.txt").write_text("for all", encoding="utf-8")
    decompress(folder, tmp_path / "plain")
    assert not (tmp_path / "plain" / "LICENSE").exists()
    assert (tmp_path / "plain" / "notes.txt").read_text(encoding="utf-8") == "for all"
    assert "LICENSE" in caplog.text
    assert caplog.text.replace("\n", "").isprintable()


def test_names_are_printed_without_control_sequences(
    golden: Callable[[str], Path], command: Any
) -> None:
    """Names of files beside the tensors, and of tensors that safetensors itself complains about."""
    folder = golden("scalar")
    (folder / f"{ESCAPE}.txt").write_text("x", encoding="utf-8")
    outcome = command("info", folder)
    assert outcome.code == 0
    assert outcome.out.replace("\n", "").isprintable()
    assert "a\\x1b[2J\\u202eb.txt" in outcome.out
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header[ESCAPE] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 1]}
    for text in (
        json.dumps(header, ensure_ascii=False),
        f'{{"__metadata__":{{}},"{ESCAPE}":{{"dtype":"{ESCAPE}","shape":[],"data_offsets":[]}}}}',
    ):
        encoded = text.encode()
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])
        for name in ("info", "verify"):
            outcome = command(name, folder)
            assert outcome.code == 2
            assert outcome.err.rstrip("\n").isprintable(), ascii(outcome.err)


def test_settings_that_transformers_loads_but_does_not_save(
    golden: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = golden("scalar")
    edit(folder / "config.json", lambda c: c.update(output_attentions=1.5))
    with pytest.raises(ModelError, match=r"config\.json"):
        decompress(folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_every_error_is_one_printable_line() -> None:
    assert str(ModelError(f"{ESCAPE}\nx")) == "a\\x1b[2J\\u202eb x"
    with pytest.raises(ValueError, match="x"):  # a ConfigError is still one
        raise CerwuError.__subclasses__()[0](f"{ESCAPE} x")


LICENCES = {
    "<img src=x onerror=alert(1)>": "&lt;img src=x onerror=alert\\(1\\)&gt;",
    "[free](https://evil.example)": "\\[free\\]\\(https\\:\\/\\/evil.example\\)",
    "mit": "mit",
    "Llama 3.2 Community": "Llama 3.2 Community",
}


@pytest.mark.parametrize(("name", "shown"), LICENCES.items())
def test_the_name_of_a_licence_is_text(name: str, shown: str, tmp_path: Path) -> None:
    fields = json.dumps({"license": "other", "license_name": name})
    (tmp_path / "README.md").write_text(f"---\n{fields}\n---\n", encoding="utf-8")
    sentence = card_of(tmp_path, tmp_path, 1)._licence()
    assert sentence == f"The weights are under the licence of the original: {shown}."


@pytest.mark.parametrize("value", [{"a": 1}, 7, "x" * 501, ["mit", 3]])
def test_a_licence_that_is_no_name_is_left_out(value: object, tmp_path: Path) -> None:
    fields = json.dumps({"license": "other", "license_name": value, "language": value})
    (tmp_path / "README.md").write_text(f"---\n{fields}\n---\n", encoding="utf-8")
    assert card_of(tmp_path, tmp_path, 1).source == {"license": "other"}


@doors
@pytest.mark.parametrize("kind", ["integers", "side data"])
def test_other_dtypes_are_refused(
    kind: str, door: Callable[[Path], Any], golden: Callable[[str], Path]
) -> None:
    """With right checksums: a norm of integers, side data of another type."""
    folder = golden("scalar")
    file = folder / "model.safetensors"
    name = "model.norm.weight" if kind == "integers" else "lm_head.weight.side"

    def spoil(header: dict[str, Any]) -> None:
        header[name]["dtype"] = "I32" if kind == "integers" else "F8_E4M3"

    file.write_bytes(Opened.of(file.read_bytes()).joined(spoil))
    with pytest.raises(FormatError, match=name.removesuffix(".side")):
        door(folder)
    if kind == "side data":
        with pytest.raises(FormatError, match="wrong dtype"):
            breakdown(folder)


def test_languages_may_be_a_list_and_a_licence_in_any_encoding(tmp_path: Path) -> None:
    fields = json.dumps({"license": "mit", "license_name": ["a"], "language": ["en", "de"]})
    (tmp_path / "README.md").write_text(f"---\n{fields}\n---\n", encoding="utf-8")
    assert card_of(tmp_path, tmp_path, 1).source == {"license": "mit", "language": ["en", "de"]}
    (tmp_path / "README.md").unlink()
    text = "\xa9 Permission is hereby granted, free of charge. THE SOFTWARE IS PROVIDED"
    (tmp_path / "LICENSE").write_bytes(text.encode("latin-1"))
    assert card_of(tmp_path, tmp_path, 1).source == {"license": "mit"}


def test_events_of_writing_are_kept_once() -> None:
    class Bare(Adapter):
        module = nn.Linear(1, 1)
        select = sensitivities = blocks = identity = None  # type: ignore[assignment]

    adapter = Bare()
    for _ in range(3):
        adapter.note(("a", "b"))
    assert adapter.events == ("a", "b")
