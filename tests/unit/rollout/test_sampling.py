"""The sampling filters against Hugging Face's, and the randomness that no layout changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_amrlhf.rollout.sampling import SamplingSettings, next_tokens, uniforms

VOCAB_SIZE = 131
NUM_UNIFORMS = 20_000
# counts over evenly spaced uniforms differ from N p by less than 1 at each end of an interval
COUNT_TOLERANCE = 2.0
# drawn: 5 standard deviations of a binomial count
DEVIATIONS = 5.0
FILTERS = [
    (0.95, 100, 0.99),  # the paper's, appendix B
    (1.0, 0, 1.0),
    (0.5, 20, 1.0),
    (1.7, 0, 0.6),
    (1.0, 7, 0.9),
    (1.0, 1, 0.5),
    (1.0, 1000, 0.3),  # top-k past the vocabulary
    (0.1, 50, 0.01),  # nothing but the likeliest token reaches so small a nucleus
]


def settings(temperature: float, top_k: int, top_p: float) -> SamplingSettings:
    return SamplingSettings(8, 64, temperature, top_k, top_p, (2,))


def logits_of(seed: int) -> torch.Tensor:
    return 2 * torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def hugging_face_probs(logits, temperature, top_k, top_p):
    """``[V]`` what ``generate`` samples from: its warpers in its order."""
    warpers = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    scores = logits[None].double()
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(dim=-1)[0]


def sampled_counts(logits, uniform, chosen: SamplingSettings):
    rows = logits.expand(uniform.numel(), VOCAB_SIZE)
    return torch.bincount(next_tokens(rows, uniform, chosen), minlength=VOCAB_SIZE)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
def test_evenly_spaced_uniforms_give_hugging_faces_probabilities(temperature, top_k, top_p, seed):
    """The inverse of the cumulative distribution, checked without chance."""
    logits = logits_of(seed)
    expected = hugging_face_probs(logits, temperature, top_k, top_p)
    uniform = (torch.arange(NUM_UNIFORMS).double() + 0.5) / NUM_UNIFORMS
    counts = sampled_counts(logits, uniform, settings(temperature, top_k, top_p))
    assert not counts[expected == 0].any(), "a token that Hugging Face filters out was sampled"
    assert (counts - NUM_UNIFORMS * expected).abs().max() < COUNT_TOLERANCE


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS[:5])
def test_every_token_of_hugging_faces_support_can_be_sampled(temperature, top_k, top_p):
    logits = logits_of(4)
    expected = hugging_face_probs(logits, temperature, top_k, top_p)
    tokens = expected.nonzero()[:, 0]
    order = tokens[expected[tokens].argsort(descending=True)]
    middle = expected[order].cumsum(0) - expected[order] / 2
    rows = logits.expand(order.numel(), VOCAB_SIZE)
    found = next_tokens(rows, middle, settings(temperature, top_k, top_p))
    assert torch.equal(found, order)


def test_drawn_uniforms_give_the_probabilities():
    logits, chosen = logits_of(5), settings(0.95, 100, 0.99)
    expected = hugging_face_probs(logits, 0.95, 100, 0.99)
    uniform = uniforms(7, 3, torch.arange(200), 100).flatten()
    counts = sampled_counts(logits, uniform, chosen)
    deviation = (NUM_UNIFORMS * expected * (1 - expected)).sqrt()
    assert not counts[expected == 0].any()
    assert ((counts - NUM_UNIFORMS * expected).abs() <= DEVIATIONS * deviation + 1).all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
def test_the_ends_of_the_unit_interval_stay_in_the_support(temperature, top_k, top_p):
    logits = logits_of(6)
    expected = hugging_face_probs(logits, temperature, top_k, top_p)
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    rows = logits.expand(2, VOCAB_SIZE)
    found = next_tokens(rows, ends, settings(temperature, top_k, top_p))
    assert found[0] == logits.argmax()
    assert (expected[found] > 0).all()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
def test_ids_that_are_no_token_are_never_sampled(temperature, top_k, top_p):
    """As Hugging Face's with their scores at -inf, also where they are the likeliest by far."""
    usable = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    usable[[7, 50]], usable[100:] = False, False
    logits = logits_of(8)
    masked = logits.masked_fill(~usable, float("-inf"))
    logits[~usable] = 30.0
    chosen = replace(settings(temperature, top_k, top_p), usable=usable)
    expected = hugging_face_probs(masked, temperature, top_k, top_p)
    uniform = (torch.arange(NUM_UNIFORMS).double() + 0.5) / NUM_UNIFORMS
    uniform[0], uniform[-1] = 0.0, 1.0 - 2.0**-53
    counts = sampled_counts(logits, uniform, chosen)
    assert not counts[~usable].any()
    assert (counts - NUM_UNIFORMS * expected).abs().max() < COUNT_TOLERANCE
    greedy = replace(chosen, temperature=0.0)
    assert next_tokens(logits[None], uniform[:1], greedy).tolist() == [int(masked.argmax())]


def test_rounding_of_the_sums_finds_no_token_without_probability(monkeypatch):
    """A scan on a GPU adds in another order, so sums may grow where nothing is added."""
    plain, growth = torch.Tensor.cumsum, 1e-16 * torch.arange(VOCAB_SIZE)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: plain(x, dim=dim) + growth)
    usable = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    usable[::3] = True
    uniform = torch.full((1,), 1.0 - 2.0**-53, dtype=torch.float64)
    chosen = replace(settings(1.0, 0, 1.0), usable=usable)
    assert usable[next_tokens(logits_of(9)[None], uniform, chosen)].all()


def test_temperature_zero_takes_the_likeliest_token():
    logits = torch.stack([logits_of(seed) for seed in range(5)])
    found = next_tokens(logits, torch.full((5,), 0.999).double(), settings(0.0, 100, 0.99))
    assert torch.equal(found, logits.argmax(dim=-1))


def test_rows_are_sampled_independently_of_their_batch():
    logits = torch.stack([logits_of(seed) for seed in range(6)])
    uniform, chosen = uniforms(1, 1, torch.arange(6), 1)[:, 0], settings(1.0, 20, 0.9)
    together = next_tokens(logits, uniform, chosen)
    alone = [next_tokens(logits[i : i + 1], uniform[i : i + 1], chosen) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


def test_uniforms_depend_on_seed_step_and_sample_alone():
    ids = torch.tensor([5, 0, 1_000_003])
    together = uniforms(7, 2, ids, 40)
    for row, sample in enumerate(ids):
        assert torch.equal(uniforms(7, 2, sample[None], 40)[0], together[row])
    assert torch.equal(uniforms(7, 2, ids.flip(0), 40), together.flip(0))
    others = [uniforms(*key, ids, 40) for key in ((8, 2), (7, 3), (2, 7))]
    assert all((other != together).all() for other in others)
    assert together.dtype == torch.float64
    assert ((together >= 0) & (together < 1)).all()
    assert uniforms(7, 2, ids[:0], 40).shape == (0, 40)


@pytest.mark.parametrize("count", [1, 15, 17, 39])
def test_a_longer_answer_starts_with_the_same_uniforms(count):
    ids = torch.tensor([3, 4])
    assert torch.equal(uniforms(7, 2, ids, 40)[:, :count], uniforms(7, 2, ids, count))


def test_uniforms_of_neighbouring_samples_are_uncorrelated():
    drawn = uniforms(0, 1, torch.arange(40), 500)
    correlation = torch.corrcoef(drawn) - torch.eye(40)
    assert correlation.abs().max() < DEVIATIONS / 500**0.5


@pytest.mark.parametrize("filters", FILTERS)
def test_a_row_without_finite_logits_has_a_token_and_changes_no_other(filters):
    logits = torch.stack([logits_of(1), torch.full((VOCAB_SIZE,), torch.nan), logits_of(2)])
    uniform = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    tokens = next_tokens(logits, uniform, settings(*filters))
    assert 0 <= int(tokens[1]) < VOCAB_SIZE
    alone = next_tokens(logits[::2], uniform[::2], settings(*filters))
    assert torch.equal(tokens[::2], alone)
