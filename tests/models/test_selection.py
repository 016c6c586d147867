"""Blocks and weights are found in every family from the module tree alone."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from cerwu_gpu.coded import CodedMatrix, Reconstruction, check
from cerwu_gpu.errors import ConfigError, FormatError, ModelError
from cerwu_gpu.models.selection import select_in_module, tower_blocks
from cerwu_gpu.spec import STREAM_SYMBOLS_LIMIT
from tests.configs import compress_flat
from tests.hf.calibrated import find_blocks, find_weights
from tests.hf.toys import FAMILIES, MIXTURES, toy
from tests.models.toys import toy as classifier

NOT_COMPRESSED = ("embed", "wte", "wpe", "lm_head", "norm", "ln_", "bias", "router", "mlp.gate.")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_the_decoder_layers_in_order(family):
    model = toy(family)
    blocks = find_blocks(model)
    assert len(blocks) == 3
    assert len({type(block) for _, block in blocks}) == 1
    assert [name.rpartition(".")[2] for name, _ in blocks] == ["0", "1", "2"]
    assert all(model.get_submodule(name) is block for name, block in blocks)


def test_the_blocks_of_a_model_of_images_are_those_of_its_tower():
    names = [name for name, _ in find_blocks(classifier("vit"))]
    assert names and all(name.startswith("vit.") for name in names)


def test_a_tower_of_convolutions_has_no_blocks():
    tower = nn.Module()
    tower.input_modalities = ("image",)
    tower.levels = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    model = nn.Module()
    model.tower = tower
    model.layers = nn.ModuleList([nn.Linear(4, 4)])
    assert tower_blocks(model) == []
    assert [name for name, _ in find_blocks(model)] == ["layers.0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_matrices_of_the_blocks_but_routers_are_chosen(family):
    model = toy(family)
    weights = find_weights(model)
    chosen = {layout.name for layout in weights.chosen}
    assert not any(part in name for name in chosen for part in NOT_COMPRESSED)
    parameters = dict(model.named_parameters())
    large = {name for name, p in parameters.items() if p.dim() >= 2}
    assert chosen.isdisjoint(weights.left)
    assert chosen | set(weights.left) == large
    for layout in weights.chosen:
        assert layout.shape == tuple(parameters[layout.name].shape)
        assert layout.parts == (4 if "experts." in layout.name else 1)
    share = sum(parameters[name].numel() for name in chosen)
    blocks = sum(p.numel() for _, block in find_blocks(model) for p in block.parameters())
    assert share > 0.95 * blocks


def test_layouts_of_transposed_weights_are_told_from_the_usual_ones():
    transposed = {
        family: {w.transposed for w in find_weights(toy(family)).chosen}
        for family in ("gpt2", "llama", "mixtral", "gpt_oss")
    }
    assert transposed == {
        "gpt2": {True},
        "llama": {False},
        "mixtral": {False},
        "gpt_oss": {True, False},
    }
    shapes = {w.name.split(".", 3)[3]: w.matrix_shape for w in find_weights(toy("gpt2")).chosen}
    assert shapes["attn.c_attn.weight"] == (96, 32)


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_are_left_alone_and_named(family):
    left = find_weights(toy(family)).left
    assert any(("gate.weight" in name or "router.weight" in name) for name in left)


def test_the_gate_of_a_shared_expert_is_left_alone():
    left = find_weights(toy("qwen2_moe")).left
    assert left["model.layers.0.mlp.shared_expert_gate.weight"] == "router"


def test_a_router_beside_a_list_of_experts_is_left_alone():
    """Older mixtures, and those from a repository's own code, keep their experts in a list."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 4)
            self.router = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4))
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    model = toy("llama")
    for block in model.model.layers:
        block.mlp = Mixture()
    weights = find_weights(model)
    assert weights.left["model.layers.1.mlp.gate.weight"] == "router"
    assert weights.left["model.layers.1.mlp.router.1.weight"] == "router"
    assert "model.layers.1.mlp.experts.3.weight" in {w.name for w in weights.chosen}


def test_experts_whose_layout_nothing_tells_are_left_alone_and_named():
    model = toy("mixtral")
    for block in model.model.layers:
        del block.mlp.experts.is_transposed
    weights = find_weights(model)
    reason = weights.left["model.layers.0.mlp.experts.gate_up_proj"]
    assert reason == "experts of unknown layout"
    assert not any("experts" in w.name for w in weights.chosen)


def test_include_and_exclude_choose_by_name():
    model = toy("llama")
    weights = find_weights(model, ["*.mlp.*", "*.q_proj"], ["model.layers.1.*"])
    assert [w.name for w in weights.chosen] == [
        f"model.layers.{block}.{name}.weight"
        for block in (0, 2)
        for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert weights.left["model.layers.1.mlp.up_proj.weight"] == "not chosen"


def test_excluding_what_is_left_alone_anyway_is_no_error():
    assert find_weights(toy("mistral"), exclude=["lm_head"]).chosen


@pytest.mark.parametrize(
    ("include", "exclude", "named"),
    [
        (["*", "*.qproj"], [], "'*.qproj'"),
        (["lm_head.*"], [], "'lm_head.*'"),
        (["*"], ["layers.7.*"], "'layers.7.*'"),
    ],
    ids=["misspelt", "head is not compressed yet", "exclude"],
)
def test_a_pattern_that_matches_nothing_is_named(include, exclude, named):
    with pytest.raises(ConfigError) as error:
        find_weights(toy("mistral"), include, exclude)
    assert named in str(error.value)


def test_excluding_everything_is_refused():
    with pytest.raises(ConfigError, match="leave no weight"):
        find_weights(toy("llama"), exclude=["*"])


def test_a_model_without_blocks_is_refused():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=0,
        num_attention_heads=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="LlamaForCausalLM has no list of blocks"):
        find_blocks(model)


def test_a_matrix_too_wide_for_the_format_is_refused_before_the_work():
    wide = nn.Sequential(nn.Linear(STREAM_SYMBOLS_LIMIT + 1, 2), nn.Linear(2, STREAM_SYMBOLS_LIMIT))
    message = r"^0.weight has matrices of 131,073 columns: the format takes at most 131,072: "
    with pytest.raises(ModelError, match=message):
        select_in_module(wide)
    chosen = select_in_module(wide, exclude=("0",)).chosen  # rows are no matter
    assert [layout.name for layout in chosen] == ["1.weight"]
    limit = nn.Sequential(nn.Linear(STREAM_SYMBOLS_LIMIT, 2))
    assert [layout.name for layout in select_in_module(limit).chosen] == ["0.weight"]


def test_a_run_with_such_a_matrix_ends_before_anything_is_calibrated(tmp_path):
    class Never(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, _):
            raise AssertionError("a batch was asked for")

    wide = nn.Sequential(nn.Linear(STREAM_SYMBOLS_LIMIT + 1, 2))
    with pytest.raises(ModelError, match="131,073 columns"):
        compress_flat(wide, tmp_path / "out", batches=Never(), progress=False)
    assert not list(tmp_path.iterdir())


def test_the_format_s_reader_has_the_same_limit():
    at, past = (
        CodedMatrix(
            name="w",
            shape=(1, columns),
            words=torch.zeros(0, dtype=torch.int64),
            lengths=torch.zeros(1, dtype=torch.int64),
            tables=torch.full((1, 1), 1 << 24),
            row_class=torch.zeros(1, dtype=torch.int64),
            column_class=torch.zeros(columns, dtype=torch.int64),
            states=0,
            parity=torch.zeros(1, dtype=torch.int64),
        )
        for columns in (STREAM_SYMBOLS_LIMIT, STREAM_SYMBOLS_LIMIT + 1)
    )
    none = torch.zeros(0, dtype=torch.int32)
    code = torch.zeros(1, dtype=torch.int16)
    rule = Reconstruction(lowest=0, size=1, escapes=none, column_step=code, row_scale=code)
    check(at, rule)
    with pytest.raises(FormatError):
        check(past, rule)


class Grouped(nn.Linear):
    """Each group of inputs has a part of the weight, as in DeepSeek-V4."""

    def forward(self, input):
        halves = self.weight.view(2, -1, self.weight.shape[1])
        return torch.cat([input @ half.T for half in halves], dim=-1)


def test_a_linear_layer_with_a_forward_of_its_own_is_left_and_named():
    model = toy("llama")
    plain = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = Grouped(plain.in_features, plain.out_features, bias=False)
    name = "model.layers.1.mlp.up_proj.weight"
    weights = find_weights(model)
    assert weights.left[name] == "a linear layer that applies its weight in its own way"
    assert weights.unasked == (name,)
    assert not find_weights(model, exclude=["*layers.1.mlp.up_proj"]).unasked
    assert find_weights(toy("falcon")).unasked == ()
