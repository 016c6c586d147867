"""The head and the input embedding as matrices: statistics, sensitivities, the way through."""

import json

import pytest
import torch
from torch.nn import functional

from cerwu_gpu.calibration.cache import CachedBlocks, HessianCache
from cerwu_gpu.compression.pipeline import compress_blocks, with_additions
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import CalibrationError, ConfigError, ModelError
from cerwu_gpu.hf.head import (
    find_head,
    lookup_frequencies,
    lookup_sensitivities,
    tied_sensitivities,
)
from cerwu_gpu.progress import Clock
from cerwu_gpu.quantize.sensitivity import Sensitivities
from tests.configs import configured
from tests.hf.calibrated import cached_blocks, find_weights, sensitivities_of
from tests.hf.calibrated import calibrated_blocks as CalibratedBlocks
from tests.hf.toys import FAMILIES, VOCABULARY, toy, toy_tokens

TOLERANCE = 1e-5
"""Of the largest entry: float32 activations in batches of another size."""

TIED = ("llama", "gemma2", "gemma3", "gpt2", "opt", "opt_projected", "falcon", "bloom")
UNTIED = tuple(family for family in FAMILIES if family not in TIED)


def head_of(model):
    """Layouts of the head and the embedding only."""
    names = find_head(model).names
    return [layout for layout in find_weights(model, head=True).chosen if layout.name in names]


def assert_near(got, expected):
    error = (got.double() - expected).abs().max()
    assert got.shape == expected.shape and error <= TOLERANCE * expected.abs().max()


def head_inputs(model, tokens):
    """What the head sees [p, d] float64 in a plain run of the whole model."""
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, arguments, output: seen.append(arguments[0])
    )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_are_found_under_the_names_of_their_parameters(family):
    model = toy(family)
    head = find_head(model)
    assert head.tied == (family in TIED)
    assert model.get_parameter(head.embedding) is model.get_input_embeddings().weight
    assert model.get_parameter(head.head) is model.get_output_embeddings().weight
    assert set(head.names) <= dict(model.named_parameters()).keys()


def test_they_are_compressed_only_where_asked_for_and_after_the_blocks():
    for family, names in (
        ("llama", ["model.embed_tokens.weight"]),
        ("mistral", ["lm_head.weight", "model.embed_tokens.weight"]),
    ):
        model = toy(family)
        without, whole = find_weights(model), find_weights(model, head=True)
        assert [layout.name for layout in whole.chosen[len(without.chosen) :]] == names
        assert whole.chosen[: len(without.chosen)] == without.chosen
        assert without.left.keys() - whole.left.keys() == set(names)
        assert all(without.left[name] == "outside the blocks" for name in names)


def test_patterns_choose_between_them():
    chosen = find_weights(toy("mistral"), ["*.q_proj", "lm_head"], head=True).chosen
    assert [layout.name for layout in chosen][3:] == ["lm_head.weight"]
    with pytest.raises(ConfigError, match="'lm_head' matches no weight"):
        find_weights(toy("mistral"), ["*.q_proj", "lm_head"])


def test_a_head_of_an_unknown_kind_is_refused_only_where_asked_for():
    model = toy("mistral")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert find_weights(model).chosen
    with pytest.raises(ModelError, match="no head that can be compressed: leave"):
        find_weights(model, head=True)


def quantized(weight):
    """A weight changed enough to change all that follows."""
    return torch.round(weight * 4) / 4


@pytest.mark.parametrize("sequential", [False, True], ids=["original inputs", "sequential"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_hessian_is_that_of_its_input(family, sequential):
    model, tokens = toy(family), toy_tokens()
    original = head_inputs(model, tokens)
    layouts = find_weights(model, head=True).chosen
    blocks = CalibratedBlocks(model, layouts, tokens, batch_size=2, sequential=sequential)
    names = find_head(model).names
    assert len(blocks) == 3 + len(names)
    for index, block in enumerate(blocks):
        matrices = block.matrices()
        if index == 3:
            x = head_inputs(model, tokens) if sequential else original
            (matrix,), (statistics,) = matrices, block.statistics().values()
            assert (matrix.name, matrix.part, matrix.input) == (names[0], 0, names[0])
            assert torch.equal(matrix.weight, model.get_output_embeddings().weight)
            assert statistics.tokens == len(x)
            assert_near(statistics.hessian, 2 / len(x) * x.T @ x)
        for matrix in matrices:
            block.replace(matrix.name, matrix.part, quantized(matrix.weight))
    for layout in layouts:
        weight = model.get_parameter(layout.name)
        assert torch.equal(weight, quantized(weight))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family in TIED)


def test_an_embedding_that_is_only_looked_up_has_the_identity():
    model = toy("mistral")
    block = list(CalibratedBlocks(model, head_of(model), toy_tokens()))[-1]
    assert block.name == "model.embed_tokens"
    (statistics,) = block.statistics().values()
    assert torch.equal(statistics.hessian, torch.eye(32) * (2 / VOCABULARY))
    assert statistics.tokens == toy_tokens().numel()
    # So that J is the mean square of the output's error over a text of equally frequent tokens.
    error = torch.randn(VOCABULARY, 32)
    objective = 0.5 * (error @ statistics.hessian * error).sum()
    torch.testing.assert_close(objective, error.square().sum(dim=1).mean())


def test_either_can_be_chosen_alone():
    model, tokens = toy("qwen3"), toy_tokens()
    for name in find_head(model).names:
        layouts = [layout for layout in head_of(model) if layout.name == name]
        blocks = list(CalibratedBlocks(model, layouts, tokens))
        assert [[matrix.name for matrix in block.matrices()] for block in blocks[3:]] == [[name]]
        known = sensitivities_of(model, layouts, tokens)
        assert known.squared_gradients.keys() == {(name, 0)}
        assert known.hessian_additions.keys() == ({name} if "embed" in name else set())


def test_every_token_has_a_frequency():
    frequencies = lookup_frequencies(torch.tensor([[3, 1], [3, 3]]), 5)
    torch.testing.assert_close(frequencies * 9, torch.tensor([1.0, 2, 1, 4, 1]).double())


def plain_ends(model, tokens):
    """Expected squares at the head's output [vocabulary] and G [d, d] at the looked-up rows, by
    autograd through the whole model, token after token."""
    rows, scores = [], []

    def keep(found):
        return lambda module, arguments, output: found.append(output) or output.retain_grad()

    embedding = model.get_input_embeddings()
    scale = float(getattr(embedding, "scalar_embed_scale", 1.0))  # Gemma 3 scales what it looks up
    handles = [
        embedding.register_forward_hook(keep(rows)),
        model.get_output_embeddings().register_forward_hook(keep(scores)),
    ]
    logits = model(input_ids=tokens, use_cache=False).logits
    functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].flatten(), reduction="sum"
    ).backward(retain_graph=True)
    g = (rows[0].grad * scale).reshape(-1, rows[0].shape[-1]).double()
    squares = torch.zeros(VOCABULARY, dtype=torch.float64)
    for sample in range(len(tokens)):
        for position in range(tokens.shape[1] - 1):
            here = logits[sample, position]
            p = here.detach().softmax(dim=0).double()
            slope = torch.autograd.grad(here.sum(), scores[0], retain_graph=True)[0]
            for target in range(0, VOCABULARY):
                gradient = -p * 0
                gradient[target] += 1
                gradient = (p - gradient) * slope[sample, position].double()
                squares += p[target] * gradient.square()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return squares / tokens.numel(), g.T @ g / len(g)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "opt_projected"])
def test_a_tied_heads_sensitivities_are_those_of_plain_autograd(family):
    model, tokens = toy(family), toy_tokens(3, 6)
    name = find_head(model).head
    squares, moment = plain_ends(model, tokens)
    x = head_inputs(model, tokens)
    hessian = 2 / len(x) * x.T @ x
    got = sensitivities_of(model, head_of(model), tokens, batch_size=2)
    assert got.squared_gradients.keys() == {(name, 0)}
    assert_near(got.hessian_additions[name], 2 / squares.sum() * moment)
    frequencies = lookup_frequencies(tokens, VOCABULARY)
    expected = tied_sensitivities(squares, frequencies, moment, hessian)[0]
    torch.testing.assert_close(got.squared_gradients[name, 0].double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "phi"])
def test_the_sensitivities_of_untied_ones_are_those_of_plain_autograd(family):
    model, tokens = toy(family), toy_tokens(3, 6)
    head = find_head(model)
    squares, moment = plain_ends(model, tokens)
    got = sensitivities_of(model, head_of(model), tokens, batch_size=2)
    assert_near(got.squared_gradients[head.head, 0], squares)
    frequencies = lookup_frequencies(tokens, VOCABULARY)
    alpha, addition = lookup_sensitivities(frequencies, moment)
    assert_near(got.squared_gradients[head.embedding, 0], alpha)
    assert_near(got.hessian_additions[head.embedding], addition)


def random_problem(columns=6, rows=40):
    """alpha, f, G, H as float64."""
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, columns, columns, generator=generator).double()
    alpha = torch.rand(rows, generator=generator).double()
    frequencies = torch.rand(rows, generator=generator).double()
    return alpha, frequencies / frequencies.sum(), a @ a.T / columns, b @ b.T / columns


def test_an_embeddings_objective_is_the_expected_cost_of_its_errors():
    _, frequencies, moment, _ = random_problem()
    alpha, addition = lookup_sensitivities(frequencies, moment)
    hessian = addition + 2 / len(frequencies) * torch.eye(len(moment))
    error = torch.randn(len(frequencies), len(moment)).double()
    objective = 0.5 * (alpha * (error @ hessian * error).sum(dim=1)).sum()
    torch.testing.assert_close(objective, (frequencies * (error @ moment * error).sum(dim=1)).sum())
    torch.testing.assert_close(hessian.trace(), torch.tensor(2.0 * 6 / 40).double())


def test_a_tied_heads_objective_is_exact_where_frequent_tokens_are_the_likely_ones():
    alpha, _, moment, hessian = random_problem()
    frequencies = alpha / alpha.sum()
    weight, addition = tied_sensitivities(alpha, frequencies, moment, hessian)
    torch.testing.assert_close(weight, alpha)
    both = alpha[:, None, None] * hessian + 2 * frequencies[:, None, None] * moment
    torch.testing.assert_close(weight[:, None, None] * (hessian + addition), both)


def test_a_tied_heads_rows_cost_what_errors_of_the_inverse_hessians_shape_cost():
    alpha, frequencies, moment, hessian = random_problem()
    weight, addition = tied_sensitivities(alpha, frequencies, moment, hessian)
    covariance = torch.linalg.inv(hessian + addition)
    cost = alpha * (hessian @ covariance).trace()
    cost += 2 * frequencies * (moment @ covariance).trace()
    objective = weight * ((hessian + addition) @ covariance).trace()
    torch.testing.assert_close(objective, cost, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_lookups_are_added_to_the_hessian_of_the_embedding_alone(family):
    model, tokens = toy(family), toy_tokens()
    layouts = find_weights(model, head=True).chosen
    sensitivities = sensitivities_of(model, layouts, tokens)
    name = find_head(model).embedding
    plain = [block.statistics() for block in CalibratedBlocks(model, layouts, tokens)]
    blocks = CalibratedBlocks(model, layouts, tokens)
    for block, before in zip(blocks, plain, strict=True):
        statistics = with_additions(block.statistics(), sensitivities)
        for key, found in statistics.items():
            added = sensitivities.hessian_additions[name] if key == name else 0
            assert torch.equal(found.hessian, before[key].hessian + added)
            assert found.tokens == before[key].tokens
    assert bool(torch.linalg.eigvalsh(statistics[name].hessian.double())[0] > 0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_cache_gives_head_and_sensitivities_back(family, tmp_path):
    model, tokens = toy(family), toy_tokens()
    layouts = find_weights(model, head=True).chosen
    cache = HessianCache(tmp_path, "key")
    assert cache.read_sensitivities() is None

    def calibrate():
        return CalibratedBlocks(model, layouts, tokens)

    first = cached_blocks(model, layouts, cache, calibrate)
    originals = [(block.name, block.matrices(), block.statistics()) for block in first]
    again = cached_blocks(model, layouts, cache, lambda: pytest.fail("calibrated again"))
    assert isinstance(again, CachedBlocks) and len(again) == len(first) == len(originals)
    for block, (name, matrices, statistics) in zip(again, originals, strict=True):
        assert block.name == name
        assert [m.input for m in block.matrices()] == [m.input for m in matrices]
        for key, found in block.statistics().items():
            assert torch.equal(found.hessian, statistics[key].hessian)
            assert found.tokens == statistics[key].tokens

    sensitivities = sensitivities_of(model, layouts, tokens)
    cache.write_sensitivities(sensitivities)
    found = cache.read_sensitivities()
    for name in ("squared_gradients", "hessian_additions"):
        ours, theirs = getattr(sensitivities, name), getattr(found, name)
        assert list(theirs) == list(ours)
        assert all(torch.equal(theirs[label], value) for label, value in ours.items())
    assert isinstance(cached_blocks(model, layouts, cache, calibrate), CachedBlocks)


def test_a_cache_without_the_head_is_not_complete(tmp_path):
    model, tokens = toy("llama"), toy_tokens()
    layouts = find_weights(model, head=True).chosen
    for number, _ in enumerate(
        cached_blocks(
            model,
            layouts,
            HessianCache(tmp_path, "key"),
            lambda: CalibratedBlocks(model, layouts, tokens),
        )
    ):
        if number == 2:
            break
    assert not HessianCache(tmp_path, "key").complete(4)
    assert len(list((tmp_path / "key").iterdir())) == 3


def test_damaged_sensitivities_are_named(tmp_path):
    cache = HessianCache(tmp_path, "key")
    cache.write_sensitivities(Sensitivities({("a", 0): torch.ones(3), ("b", 1): torch.zeros(2)}))
    (file,) = (tmp_path / "key").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CalibrationError, match=r"sensitivities\.safetensors is damaged: delete"):
        cache.read_sensitivities()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_the_pipeline_stores_them_like_any_matrix(family, tmp_path):
    model, tokens = toy(family), toy_tokens()
    layouts = {layout.name: layout for layout in find_weights(model, head=True).chosen}
    sensitivities = sensitivities_of(model, list(layouts.values()), tokens)
    original = {name: model.get_parameter(name).detach().clone() for name in layouts}
    blocks = CalibratedBlocks(model, list(layouts.values()), tokens)
    dtypes = dict.fromkeys(layouts, torch.float32)
    config = configured(lmbda=1e-8, sensitivity="row")
    with DirectoryWriter(tmp_path / "out", generator="test", overwrite=False) as writer:
        reports = compress_blocks(
            blocks, layouts, dtypes, writer, config, Clock(), sensitivities=sensitivities
        )
        (writer.folder / "config.json").write_text(json.dumps({}))
        writer.complete()
        writer.publish()
    names = find_head(model).names
    last = reports[-len(names) :]
    assert [report.name for report in last] == list(names)
    assert all(report.relative_loss < 0.1 and report.events == () for report in last), last
    decoded = dict(open_directory(tmp_path / "out").weights())
    for name in names:
        assert torch.equal(decoded[name], model.get_parameter(name))
        assert not torch.equal(decoded[name], original[name])
