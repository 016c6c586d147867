"""Compressed directories opened as their users will, without memory for the weights, before they
are published; what would fail there is refused before the work where it can be known then.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from cerwu_gpu.compression.adapter import Adapter
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.errors import CerwuError, ModelError, reason
from cerwu_gpu.files import read_json
from cerwu_gpu.hf.kinds import KINDS, remote_class
from cerwu_gpu.hf.models import load_tokenizer
from cerwu_gpu.models.module import state_difference
from cerwu_gpu.serving.description import described_model


def check_before(adapter: Adapter, trust_remote_code: bool) -> None:
    """Refuse a model whose compressed directory could not be loaded, before any work.

    Raises:
        ModelError: config.json does not describe the model, as after layers were pruned or tied by
            hand, or a file beside the weights cannot be read.
    """
    model = adapter.module
    assert isinstance(model, PreTrainedModel)
    with tempfile.TemporaryDirectory() as name:
        adapter.write_files(Path(name))
        fresh = _open(Path(name), model, trust_remote_code)
    if type(fresh) is not type(model):
        raise ModelError(
            f"{type(model).__name__} is a class of your own, and its directory would be loaded as "
            f"{type(fresh).__name__} of transformers: give the model as that class."
        )
    state = dict(model.state_dict(keep_vars=True))
    _check_state(fresh, {name: tuple(tensor.shape) for name, tensor in state.items()}, _INSTEAD)
    _check_shared(fresh, state)


def check_written(folder: Path, adapter: Adapter, trust_remote_code: bool) -> None:
    """Open a complete directory by each of its doors, on the meta device.

    Raises:
        ModelError: one of them fails, or leaves a weight at random.
    """
    tensors = open_directory(folder).inventory().tensors
    stored = {entry.name: entry.shape for entry in tensors if entry.name not in adapter.carried}
    model = adapter.module
    assert isinstance(model, PreTrainedModel)
    _check_state(_open(folder, model, trust_remote_code), stored, _DEFECT)


_INSTEAD = "bring its configuration and its weights together, or load the model anew"
_DEFECT = "this is a defect of cerwu_gpu; please report it"


def _open(folder: Path, given: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model of a directory on the meta device, and read its other files."""
    content = read_json(folder / "config.json")
    code = remote_class(content)
    if code is not None or given.is_remote_code():
        _check_code(folder, content, type(given).__name__)
    try:
        # Code of the directory itself has run already: it is not imported a second time.
        config, kind = (given.config, type(given)) if code else described_model(folder)
        with torch.device("meta"):
            model = kind(config)
        model.tie_weights()
        if code is None:
            _check_doors(folder, config, kind)
    except CerwuError:
        raise
    except Exception as error:  # whatever transformers makes of a configuration
        raise ModelError(
            f"transformers cannot build {type(given).__name__} from its configuration "
            f"({reason(error)}): bring the configuration in order."
        ) from error
    if (folder / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # whatever transformers makes of a damaged file
            raise ModelError(
                f"generation_config.json of the model cannot be read ({reason(error)}): "
                "mend it, or take it away."
            ) from error
    load_tokenizer(folder, trust_remote_code)
    return model


def _check_code(folder: Path, content: Mapping[str, Any], name: str) -> None:
    """Refuse a model whose code is not in its directory.

    Raises:
        ModelError: it is not.
    """
    references = content.get("auto_map") or {}
    files = {f"{str(one).rpartition('.')[0]}.py" for one in references.values() if one}
    missing = sorted(file for file in files if not (folder / file).is_file())
    if remote_class(content) is None or missing:
        raise ModelError(
            f"{name} is no class of transformers and its code "
            f"({', '.join(missing) or 'of config.json'}) is not at hand: give the directory that "
            "holds it."
        )


def _check_doors(folder: Path, config: PretrainedConfig, kind: type[PreTrainedModel]) -> None:
    """Refuse a directory that the Auto classes would build another model from.

    Raises:
        ModelError: they would.
    """
    auto = AutoConfig.from_pretrained(folder)
    doors = [one for door in KINDS for one in door.classes_of(auto)]
    if type(auto) is not type(config) or kind not in doors:
        raise ModelError(
            f"transformers' Auto classes read the configuration of {kind.__name__} as "
            f"{type(auto).__name__}: give it its own model_type."
        )


def _check_state(model: PreTrainedModel, stored: Mapping[str, tuple[int, ...]], do: str) -> None:
    """Refuse tensors that are not those of `model`, by names and shapes.

    Raises:
        ModelError: the first difference, and what to do.
    """
    kind = type(model).__name__
    described = f"the {kind} of its config.json"
    difference = state_difference(model.state_dict(keep_vars=True), stored, described)
    if difference is not None:
        raise ModelError(f"the {kind} is not as its configuration says ({difference}): {do}.")


def _check_shared(fresh: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are one in `state` and several in the model of config.json.

    Raises:
        ModelError: there is a pair.
    """
    places = dict(fresh.state_dict(keep_vars=True))
    first: dict[int, str] = {}
    for name, tensor in state.items():
        other = first.setdefault(id(tensor), name)
        if places[other] is not places[name]:
            raise ModelError(
                f"{other} and {name} are one parameter, and two in the {type(fresh).__name__} of "
                "config.json: tie them by the configuration, or give one of them a copy."
            )
