"""Sensitivities, against one plain forward and backward pass of the whole model."""

from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.hf import causal_lm
from tests.hf.calibrated import find_weights, output_sensitivities
from tests.hf.toys import FAMILIES, MIXTURES, toy, toy_tokens

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Of a matrix's largest sensitivity; bfloat16 against float32."""


def plain_gradients(model, layouts, tokens):
    """(name, part) -> dL/dy [p, m] float64 by autograd through the whole model at once."""
    names = {layout.name for layout in layouts}
    outputs = defaultdict(list)

    def linear_hook(name):
        def hook(module, arguments, output):
            output.retain_grad()
            outputs[name, 0].append(output)

        return hook

    handles, replaced = [], []
    for name, module in model.named_modules():
        if f"{name}.weight" in names and isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_hook(linear_hook(f"{name}.weight")))
        elif f"{name}.gate_up_proj" in names:
            by_name = {layout.name: layout for layout in layouts}
            module.forward = plain_experts(module, name, by_name, outputs)
            replaced.append(module)
    with torch.enable_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
        functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].flatten(), reduction="sum"
        ).backward()
    for handle in handles:
        handle.remove()
    for module in replaced:
        del module.forward
    model.zero_grad()
    return {
        label: torch.cat([y.grad.reshape(-1, y.shape[-1]) for y in found]).double()
        for label, found in outputs.items()
    }


def plain_experts(module, prefix, layouts, outputs):
    """What the experts compute, written out, with each product's output kept."""
    up, down = layouts[f"{prefix}.gate_up_proj"], layouts[f"{prefix}.down_proj"]

    def product(layout, parameter, part, x):
        y = x @ layout.matrix(parameter, part).T
        y.retain_grad()
        outputs[layout.name, part].append(y)
        return y

    def forward(hidden, chosen, weights):
        result = torch.zeros_like(hidden)
        for part in range(up.parts):
            token, slot = torch.where(chosen == part)
            gate_up = product(up, module.gate_up_proj, part, hidden[token])
            if module.has_bias:
                gate_up = gate_up + module.gate_up_proj_bias[part]
            y = product(down, module.down_proj, part, module._apply_gate(gate_up))
            if module.has_bias:
                y = y + module.down_proj_bias[part]
            result = result.index_add(0, token, y * weights[token, slot, None])
        return result

    return forward


def assert_near(alpha, expected, dtype=torch.float32):
    assert alpha.dtype == torch.float32 and alpha.shape == expected.shape
    error = (alpha.double() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_the_mean_squared_gradients_of_the_whole_model(family):
    model, tokens = toy(family), toy_tokens()
    layouts = find_weights(model).chosen
    gradients = plain_gradients(model, layouts, tokens)
    alphas = output_sensitivities(model, layouts, tokens, batch_size=2)  # batches of 2, 2 and 1
    assert list(alphas) == [(w.name, part) for w in layouts for part in range(w.parts)]
    assert all(alpha.any() for (name, _), alpha in alphas.items() if "experts" not in name)
    for label, alpha in alphas.items():
        found = gradients[label]
        assert_near(alpha, found.square().sum(dim=0) / max(len(found), 1))


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_without_tokens_has_none(family):
    model, tokens = toy(family), toy_tokens(1, 2)  # 2 tokens, 2 of 4 experts each
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "router.weight", "router.bias")):
            nn.init.zeros_(parameter)  # every token goes to the same two experts
    layouts = [w for w in find_weights(model).chosen if w.name.endswith("0.mlp.experts.down_proj")]
    alphas = output_sensitivities(model, layouts, tokens)
    assert sorted(bool(alpha.any()) for alpha in alphas.values()) == [False, False, True, True]


def test_few_logits_at_a_time_change_nothing(monkeypatch):
    model, tokens = toy("gemma2"), toy_tokens()
    layouts = find_weights(model, head=True).chosen
    whole = output_sensitivities(model, layouts, tokens)
    monkeypatch.setattr(causal_lm, "LOGITS", 2 * tokens.shape[1] * 320)  # 2, 2 and 1 sequences
    for label, alpha in output_sensitivities(model, layouts, tokens).items():
        assert_near(alpha, whole[label].double())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_the_model_is_left_as_it_was(family):
    model = toy(family)
    frozen = {name for number, (name, _) in enumerate(model.named_parameters()) if number % 3 == 0}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    implementation = model.config._experts_implementation
    output_sensitivities(model, find_weights(model, head=True).chosen, toy_tokens())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (name not in frozen)
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert model.config._experts_implementation == implementation
    original = toy(family).state_dict().values()
    assert all(map(torch.equal, model.state_dict().values(), original))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_frozen_weights_and_a_caller_without_gradients_do_not_matter(family):
    model, tokens = toy(family), toy_tokens()
    layouts = find_weights(model, head=True).chosen
    expected = output_sensitivities(model, layouts, tokens)
    model.requires_grad_(False)
    with torch.no_grad():
        alphas = output_sensitivities(model, layouts, tokens)
    assert all(torch.equal(alphas[label], expected[label]) for label in expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_bfloat16_model_has_about_the_same(family):
    model, tokens = toy(family), toy_tokens(8, 48)
    layouts = [w for w in find_weights(model, head=True).chosen if "experts" not in w.name]
    expected = output_sensitivities(model, layouts, tokens)
    for label, alpha in output_sensitivities(model.to(torch.bfloat16), layouts, tokens).items():
        assert_near(alpha, expected[label].double(), torch.bfloat16)


def test_a_gradient_that_is_not_finite_is_named_with_its_matrix():
    model = toy("mistral")
    with torch.no_grad():
        model.model.norm.weight.mul_(1e30)
    words = r"output of model\.layers\.2\.mlp\.down_proj\.weight is not finite"
    with pytest.raises(CalibrationError, match=words):
        output_sensitivities(model, find_weights(model).chosen, toy_tokens())
    with torch.no_grad():
        model.lm_head.weight[5, 5] = torch.inf
    with pytest.raises(CalibrationError, match=r"gradient at lm_head\.weight is not finite"):
        output_sensitivities(
            model, find_weights(model, ["lm_head"], head=True).chosen, toy_tokens()
        )
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_only_chosen_matrices_are_looked_at():
    model = toy("qwen3")
    whole = output_sensitivities(model, find_weights(model).chosen, toy_tokens())
    layouts = find_weights(model, ["*.1.mlp.down_proj"]).chosen
    (label,) = alphas = output_sensitivities(model, layouts, toy_tokens())
    assert label == ("model.layers.1.mlp.down_proj.weight", 0)
    assert torch.equal(alphas[label], whole[label])


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)], ids=["no text", "nothing to predict"])
def test_a_text_without_a_loss_is_refused(shape):
    model = toy("opt")
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        output_sensitivities(
            model, find_weights(model).chosen, torch.zeros(shape, dtype=torch.int64)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt2", "opt_projected"])
def test_a_gpu_gives_the_same_and_the_model_stays_on_the_cpu(family):
    model, tokens = toy(family), toy_tokens()
    layouts = find_weights(model, head=True).chosen
    expected = output_sensitivities(model, layouts, tokens)
    for label, alpha in output_sensitivities(model, layouts, tokens, device="cuda").items():
        assert alpha.device.type == "cpu"
        error = (alpha - expected[label]).abs().max()
        assert error <= 10 * TOLERANCE[torch.float32] * expected[label].abs().max(), label
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
