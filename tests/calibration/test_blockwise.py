"""Statistics of every family's blocks, against inputs that plain hooks see in the whole model."""

from collections import defaultdict

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cerwu_gpu.errors import CalibrationError, ModelError
from tests.hf.calibrated import adapter_of, find_blocks, find_weights
from tests.hf.calibrated import calibrated_blocks as CalibratedBlocks
from tests.hf.toys import FAMILIES, MIXTURES, toy, toy_tokens

TOLERANCE = 1e-5
"""Of the largest entry of H: float32 activations in batches of another size."""


def inputs_of_whole_model(model, layouts, tokens):
    """(name, part) -> inputs [p, n] float64, from forward hooks in one run of the whole model."""
    found = defaultdict(list)
    parameters = {layout.name: layout for layout in layouts}

    def linear_hook(name):
        return lambda module, arguments, output: found[name, 0].append(flat(arguments[0]))

    def experts_hook(prefix):
        return lambda module, arguments, output: expert_inputs(module, prefix, *arguments)

    def expert_inputs(module, prefix, hidden, chosen, _):
        up, down = parameters[f"{prefix}.gate_up_proj"], parameters[f"{prefix}.down_proj"]
        for part in range(up.parts):
            x = hidden[(chosen == part).any(dim=1)]
            gate_up = x @ up.matrix(module.gate_up_proj, part).T
            if module.has_bias:
                gate_up = gate_up + module.gate_up_proj_bias[part]
            found[up.name, part].append(flat(x))
            found[down.name, part].append(flat(module._apply_gate(gate_up)))

    handles = []
    for name, module in model.named_modules():
        if f"{name}.weight" in parameters and isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_hook(linear_hook(f"{name}.weight")))
        elif f"{name}.gate_up_proj" in parameters:
            handles.append(module.register_forward_hook(experts_hook(name)))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {label: torch.cat(pieces) for label, pieces in found.items()}


def flat(x):
    return x.detach().reshape(-1, x.shape[-1]).double()


def assert_statistics(block, inputs):
    """The block's statistics are those of these inputs."""
    statistics = block.statistics()
    for matrix in block.matrices():
        x = inputs[matrix.name, matrix.part]
        got = statistics[matrix.input]
        assert got.tokens == len(x)
        assert got.hessian.dtype == torch.float32
        assert torch.equal(got.hessian, got.hessian.T)
        expected = 2 / max(len(x), 1) * x.T @ x
        error = (got.hessian.double() - expected).abs().max()
        assert error <= TOLERANCE * expected.abs().max(), matrix


@pytest.mark.parametrize("family", FAMILIES)
def test_hessians_are_those_of_the_whole_models_inputs(family):
    model, tokens = toy(family), toy_tokens()
    layouts = find_weights(model).chosen
    inputs = inputs_of_whole_model(model, layouts, tokens)
    blocks = CalibratedBlocks(model, layouts, tokens, batch_size=2)  # batches of 2, 2 and 1
    covered = []
    for block in blocks:
        assert_statistics(block, inputs)
        covered += [(matrix.name, matrix.part) for matrix in block.matrices()]
    assert covered == [(w.name, part) for w in layouts for part in range(w.parts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_one_by_one_give_the_models_own_hidden_states(family):
    model, tokens = toy(family), toy_tokens()
    blocks = find_blocks(model)
    seen = []
    handle = blocks[-1][1].register_forward_hook(
        lambda module, arguments, output: seen.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.no_grad():
        for batch in tokens.split(2):
            model(input_ids=batch, use_cache=False)
    handle.remove()
    backbone, _ = adapter_of(model, find_weights(model).chosen).backbone()
    captured = backbone.capture(tokens.split(2), torch.device("cpu"))
    for hidden, expected in zip(captured.hidden, seen, strict=True):
        with torch.no_grad():
            for (_, block), calls in zip(blocks, captured.calls, strict=True):
                hidden = calls[len(hidden)].run(block, hidden)
        torch.testing.assert_close(hidden, expected)


def test_capturing_leaves_the_model_as_it_was():
    model = toy("mixtral")
    list(CalibratedBlocks(model, find_weights(model).chosen, toy_tokens()))
    for _, block in find_blocks(model):
        assert "forward" not in block.__dict__
        assert not any(module._forward_pre_hooks for module in block.modules())
    assert model.config._experts_implementation == toy("mixtral").config._experts_implementation


SHARED = {
    "llama": [{"q", "k", "v"}, {"o"}, {"gate", "up"}, {"down"}],
    "phi": [{"q", "k", "v", "fc1"}, {"dense"}, {"fc2"}],
    "gpt2": [{"c_attn"}, {"attn.c"}, {"c_fc"}, {"mlp.c"}],
    "falcon": [{"query_key_value", "dense_h_to_4h"}, {"self_attention.dense"}, {"dense_4h_to_h"}],
}


@pytest.mark.parametrize("family", SHARED)
def test_matrices_that_see_the_same_input_share_one_hessian(family):
    model = toy(family)
    for block in CalibratedBlocks(model, find_weights(model).chosen, toy_tokens()):
        groups = defaultdict(list)
        for matrix in block.matrices():
            groups[matrix.input].append(matrix.name.removesuffix(".weight").removesuffix("_proj"))
        assert set(groups) == set(block.statistics())
        assert len(groups) == len(SHARED[family])
        for expected in SHARED[family]:
            assert any(
                len(names) == len(expected)
                and all(any(name.endswith(end) for name in names) for end in expected)
                for names in groups.values()
            ), (expected, groups)


def quantized(weight):
    """A weight changed enough to change all that follows."""
    return torch.round(weight * 4) / 4


@pytest.mark.parametrize("sequential", [False, True], ids=["original inputs", "sequential"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "falcon"])
def test_inputs_come_from_original_or_from_replaced_blocks(family, sequential):
    model, tokens = toy(family), toy_tokens()
    layouts = find_weights(model).chosen
    original = inputs_of_whole_model(model, layouts, tokens)
    blocks = CalibratedBlocks(model, layouts, tokens, batch_size=2, sequential=sequential)
    for block in blocks:
        # Within a block, the inputs are those of the block's own original weights.
        now = inputs_of_whole_model(model, layouts, tokens)
        assert_statistics(block, now if sequential else original)
        for matrix in block.matrices():
            block.replace(matrix.name, matrix.part, quantized(matrix.weight))
    parameters = dict(model.named_parameters())
    for layout in layouts:
        assert torch.equal(parameters[layout.name] * 4, (parameters[layout.name] * 4).round())


def test_replaced_weights_do_not_change_the_statistics_or_matrices_already_given():
    model = toy("llama")
    block = next(iter(CalibratedBlocks(model, find_weights(model).chosen, toy_tokens())))
    before = {m.name: m.weight.clone() for m in block.matrices()}
    matrices = block.matrices()
    hessians = {key: value.hessian.clone() for key, value in block.statistics().items()}
    for matrix in matrices:
        block.replace(matrix.name, matrix.part, torch.zeros_like(matrix.weight))
    assert all(torch.equal(matrix.weight, before[matrix.name]) for matrix in matrices)
    assert all(torch.equal(v.hessian, hessians[k]) for k, v in block.statistics().items())


def test_replacing_before_asking_still_observes_the_original_block():
    model, tokens = toy("llama"), toy_tokens()
    layouts = find_weights(model).chosen
    inputs = inputs_of_whole_model(model, layouts, tokens)
    blocks = iter(CalibratedBlocks(model, layouts, tokens))
    first = next(blocks)
    first.replace("model.layers.0.self_attn.q_proj.weight", 0, torch.zeros(32, 32))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, torch.zeros(32, 32))
    assert_statistics(next(blocks), inputs)


def test_weights_that_are_not_chosen_are_streamed_through_all_the_same():
    model, tokens = toy("qwen3"), toy_tokens()
    layouts = find_weights(model, ["*.2.mlp.down_proj"]).chosen
    inputs = inputs_of_whole_model(model, layouts, tokens)
    blocks = list(CalibratedBlocks(model, layouts, tokens))
    assert [len(block.matrices()) for block in blocks] == [0, 0, 1]
    assert_statistics(blocks[2], inputs)


def test_a_bfloat16_model_gives_float32_statistics_and_takes_bfloat16_weights():
    model = toy("llama").to(torch.bfloat16)
    block = next(iter(CalibratedBlocks(model, find_weights(model).chosen, toy_tokens())))
    matrix = block.matrices()[0]
    assert matrix.weight.dtype == torch.float32
    assert block.statistics()[matrix.input].hessian.dtype == torch.float32
    block.replace(matrix.name, 0, matrix.weight / 3)
    assert torch.equal(model.get_parameter(matrix.name), (matrix.weight / 3).to(torch.bfloat16))


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_without_tokens_has_a_zero_hessian(family):
    model, tokens = toy(family), toy_tokens(1, 2)  # 2 tokens, 2 of 4 experts each
    layouts = find_weights(model).chosen
    # An undecided router sends every token to the same two experts.
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "router.weight", "router.bias")):
            torch.nn.init.zeros_(parameter)
    block = next(iter(CalibratedBlocks(model, layouts, tokens)))
    statistics = block.statistics()
    experts = [m for m in block.matrices() if m.name.endswith("experts.down_proj")]
    assert sorted(statistics[m.input].tokens for m in experts) == [0, 0, 2, 2]
    for matrix in block.matrices():
        if statistics[matrix.input].tokens == 0:
            assert not statistics[matrix.input].hessian.any()
            assert statistics[matrix.input].hessian.shape == (matrix.weight.shape[1],) * 2


def test_an_activation_that_is_not_finite_is_named_with_its_sample():
    model, tokens = toy("llama"), toy_tokens()
    tokens[tokens == 7] = 8
    tokens[3, 5] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    blocks = CalibratedBlocks(model, find_weights(model).chosen, tokens, batch_size=2)
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj.*sample 3:"):
        next(iter(blocks)).statistics()


def test_a_model_that_changes_hidden_states_between_blocks_is_refused():
    model = toy("llama")
    model.model.layers[1].register_forward_pre_hook(
        lambda module, arguments: (2 * arguments[0], *arguments[1:])
    )
    blocks = CalibratedBlocks(model, find_weights(model).chosen, toy_tokens())
    with pytest.raises(CalibrationError, match=r"before model\.layers\.1 .* not supported"):
        next(iter(blocks))
    assert "forward" not in model.model.layers[1].__dict__


def test_a_model_whose_blocks_are_given_something_of_the_text_is_refused():
    model = toy("llama")
    model.model.layers[1].register_forward_pre_hook(
        lambda module, arguments, keywords: (arguments, keywords | {"text": arguments[0] + 0}),
        with_kwargs=True,
    )
    blocks = CalibratedBlocks(model, find_weights(model).chosen, toy_tokens(), batch_size=1)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1 is given .* not supported"):
        next(iter(blocks))


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), CalibrationError, "no calibration tokens"),
        (torch.full((1, 8), 320), ModelError, "id 320 .* 320 embeddings"),
        (torch.zeros(1, 129, dtype=torch.int64), ModelError, "129 tokens .* 128 positions"),
    ],
    ids=["none", "outside the vocabulary", "too long"],
)
def test_tokens_that_the_model_cannot_take_are_refused(tokens, error, words):
    model = toy("opt")
    with pytest.raises(error, match=words):
        CalibratedBlocks(model, find_weights(model).chosen, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt2", "gpt_oss"])
def test_a_gpu_gives_the_same_hessians_and_the_model_stays_on_the_cpu(family):
    model, tokens = toy(family), toy_tokens()
    layouts = find_weights(model).chosen
    inputs = inputs_of_whole_model(model, layouts, tokens)
    for block in CalibratedBlocks(model, layouts, tokens, device="cuda", batch_size=2):
        assert all(matrix.weight.device.type == "cuda" for matrix in block.matrices())
        for matrix in block.matrices():
            got = block.statistics()[matrix.input]
            x = inputs[matrix.name, matrix.part]
            expected = 2 / max(len(x), 1) * x.T @ x
            error = (got.hessian.cpu().double() - expected).abs().max()
            assert error <= 10 * TOLERANCE * expected.abs().max(), matrix.name
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_both_streams_are_one_until_a_weight_changes(family: str) -> None:
    model = toy(family)
    layouts = find_weights(model, head=True).chosen
    blocks = CalibratedBlocks(model, layouts, toy_tokens(), correct_drift=True)
    changed = False
    for block in blocks:
        for statistics in block.statistics().values():
            if statistics.cross is None:
                continue  # experts, and embeddings that are only looked up
            same = torch.allclose(statistics.cross, statistics.hessian, rtol=1e-4, atol=1e-5)
            assert same == (not changed)
        if not changed and block.name.endswith(".1"):
            for matrix in block.matrices():
                block.replace(matrix.name, matrix.part, 0.5 * matrix.weight)
            changed = True
    assert changed
