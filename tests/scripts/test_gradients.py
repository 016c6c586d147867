"""scripts/gradients.py measures what the package measures; treatments of drift that scripts try."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from cerwu_gpu import Calibration, CompressionConfig
from cerwu_gpu.hf.text import CalibrationTokens
from scripts import allocation, data_free, drift_shares
from scripts.drift_shares import Moments, Stream, fitted_share
from scripts.gradients import FEW, Gradients
from scripts.judge import Quality, at_bits
from scripts.token_weights import floored
from tests.hf.calibrated import adapter_of, find_weights
from tests.hf.toys import toy, toy_tokens

MODEL = "qwen2"


@pytest.fixture(scope="module")
def measured():
    model = toy(MODEL)
    tokens = toy_tokens(FEW + 2, 16)
    return model, tokens, Gradients(model, tokens, weighted=True)


def test_sensitivities_and_hessians_are_those_of_the_package(measured):
    model, tokens, gradients = measured
    config = CompressionConfig(calibration=Calibration(), drift="ignore")
    layouts = find_weights(model).chosen
    adapter = adapter_of(model, layouts, tokens)
    adapter.take(CalibrationTokens(tokens, tokens[:0]))
    alphas = adapter.backward(tokens, 4).squared_gradients
    for name, alpha in gradients.all.items():
        torch.testing.assert_close(alpha, alphas[f"{name}.weight", 0], rtol=1e-3, atol=1e-9)
    few = adapter.backward(tokens[:FEW], 4).squared_gradients
    for name, alpha in gradients.few.items():
        torch.testing.assert_close(alpha, few[f"{name}.weight", 0], rtol=1e-3, atol=1e-9)
    hessians = gradients.hessians()
    for block in adapter.blocks(config):
        for key, statistics in block.statistics().items():
            name = key.removesuffix(".weight")
            torch.testing.assert_close(hessians[name], statistics.hessian, rtol=1e-3, atol=1e-5)


def test_weights_of_tokens_have_mean_one(measured):
    _, _, gradients = measured
    for seen in gradients.inputs.values():
        seen.x = [torch.ones_like(x) for x in seen.x]
    for hessian in gradients.hessians(1.0).values():
        torch.testing.assert_close(hessian, torch.full_like(hessian, 2.0))


def test_only_chosen_layers_are_quantized(measured):
    model, _, gradients = measured
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    done = gradients.quantize(
        gradients.hessians(), floored(gradients.few), 1e-7, lambda name: "v_proj" in name
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("v_proj.weight" not in name), name
    assert 0 < done.bits < 16 and done.loss > 0


def test_the_search_ends_at_the_wanted_bits():
    found = at_bits(
        3.0, 1e-8, lambda lmbda: 5 - 0.2 * torch.tensor(lmbda * 1e9).log2().item(), dict
    )
    assert found.bits == pytest.approx(3.0, rel=0.004)
    assert Quality(2.0, 0.1)._asdict() == {"perplexity": 2.0, "kl": 0.1}


def test_a_share_is_whole_where_the_correction_is_true_and_none_where_it_is_noise():
    weight, map_back = torch.randn(4, 6), torch.eye(6) + 0.3 * torch.randn(6, 6)
    true, noise = Moments(), Moments()
    for number in range(8):
        x_hat = torch.randn(200, 6)
        true.add(number % 2, x_hat @ map_back.T, x_hat, None)
        noise.add(number % 2, x_hat + torch.randn(200, 6), x_hat, None)
    assert fitted_share(weight, true, False) > 0.95
    assert fitted_share(weight, noise, False) < 0.2


def judging(model, tokens):
    """A judge of a toy, for which every model is equally good."""
    return SimpleNamespace(
        loaded=SimpleNamespace(model=model),
        windows={"text": tokens},
        calibration=lambda samples: tokens,
        quality=lambda windows=None: {"text": Quality(1.0, 0.5)},
    )


@pytest.mark.parametrize("case", drift_shares.CASES)
def test_every_treatment_of_drift_runs(case, monkeypatch, tmp_path):
    model = toy("llama")
    tokens = toy_tokens(FEW, 16)
    stream = Stream(model, tokens)
    seen, output = stream.watched(model.model.layers[0], 0)
    expected = model.model(input_ids=tokens[:1], output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(output, expected.hidden_states[1])
    assert [x.shape[1] for x in seen.inputs] == [32, 32, 32, 48]
    monkeypatch.setattr(drift_shares, "Judge", lambda *_, **__: judging(model, tokens))
    path = tmp_path / "rows.jsonl"
    drift_shares.main(["wikitext", case, "-o", str(path), "--blocks", "3", "--lmbda", "1e-6"])
    assert f'"case": "{case}"' in path.read_text(encoding="utf-8")


def test_factors_are_measured_over_predicted_and_importances_end_at_equal_bits(
    monkeypatch, tmp_path
):
    model, tokens = toy("llama"), toy_tokens(FEW, 16)
    for script in (allocation, data_free):
        monkeypatch.setattr(script, "Judge", lambda *_, **__: judging(model, tokens))
    path = tmp_path / "rows.jsonl"
    allocation.main(["wikitext", "-o", str(path), "--bits", "4"])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    probes = [row for row in rows if row.get("kind") == "v"]
    (factors,) = (row["factors"]["text"] for row in rows if "factors" in row)
    assert set(factors) == {"first block", "last block", *allocation.PARTS.values()}
    assert factors["v"] == pytest.approx(
        math.prod(0.5 / row["predicted"] for row in probes) ** (1 / len(probes))
    )
    path.unlink()
    data_free.main(["wikitext", "relative", "weight", "-o", str(path)])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["importance"] for row in rows] == ["relative", "weight"]
