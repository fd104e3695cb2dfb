"""Log-probs and entropy of vocabulary-parallel logits against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_amrlhf.parallel import vocab
from megatron_amrlhf.parallel.vocab import entropy, gather_logits, token_logprobs
from tests.distributed.processes import run_on

VOCAB_SIZE = 131
POSITIONS = 7
FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-5  # absolute, of logits of order 3
BFLOAT16_GRADIENT_TOLERANCE = 4e-3  # the gradient is stored in bfloat16: 8 bits
TEMPERATURES = (1.0, 0.7)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one not full."""
    monkeypatch.setattr(vocab, "CHUNK_POSITIONS", 3)


def logits_and_targets(padding: int = 0):
    """``[7, 131 + padding]`` float64 logits, with huge garbage in the padded columns."""
    random = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(POSITIONS, VOCAB_SIZE + padding, generator=random).double()
    logits[:, VOCAB_SIZE:] = 1e4
    targets = torch.randint(0, VOCAB_SIZE, (POSITIONS,), generator=random)
    targets[0], targets[1] = 0, VOCAB_SIZE - 1
    return logits, targets


def plain_logprobs(logits, targets, temperature):
    logprobs = torch.log_softmax(logits[:, :VOCAB_SIZE] / temperature, dim=-1)
    return logprobs[torch.arange(POSITIONS), targets]


def plain_entropy(logits):
    logprobs = torch.log_softmax(logits[:, :VOCAB_SIZE], dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("padding", [0, 5])
def test_logprobs_equal_log_softmax(group, temperature, padding):
    logits, targets = logits_and_targets(padding)
    before = logits.clone()
    found = token_logprobs(logits, targets, VOCAB_SIZE, group, temperature=temperature)
    expected = plain_logprobs(logits, targets, temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_TOLERANCE)
    assert torch.equal(logits, before), "the logits were changed in place"


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_of_logprobs_passes_gradcheck(group, temperature):
    logits, targets = logits_and_targets(padding=2)
    logits[:, VOCAB_SIZE:] = 0.5
    logits = logits[:, VOCAB_SIZE - 9 :].clone().requires_grad_()  # 9 true columns and 2 padded
    targets = targets % 9

    def logprobs(logits):
        return token_logprobs(logits, targets, 9, group, temperature=temperature)

    assert torch.autograd.gradcheck(logprobs, (logits,))


def test_gradient_equals_torchs_and_is_zero_in_padded_columns(group):
    logits, targets = logits_and_targets(padding=5)
    weight = torch.linspace(-1, 2, POSITIONS).double()
    mine, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (token_logprobs(mine, targets, VOCAB_SIZE, group) * weight).sum().backward()
    (plain_logprobs(plain, targets, 1.0) * weight).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=0, atol=FLOAT64_TOLERANCE)
    assert not mine.grad[:, VOCAB_SIZE:].any()


def test_bfloat16_logits_are_computed_in_float32(group):
    logits, targets = logits_and_targets()
    rounded = logits.bfloat16()
    mine, plain = rounded.clone().requires_grad_(), rounded.double().requires_grad_()
    found = token_logprobs(mine, targets, VOCAB_SIZE, group)
    expected = plain_logprobs(plain, targets, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=FLOAT32_TOLERANCE)
    found.sum().backward()
    expected.sum().backward()
    assert mine.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        mine.grad.double(), plain.grad, rtol=BFLOAT16_GRADIENT_TOLERANCE, atol=1e-8
    )


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_entropy_equals_torchs_and_ignores_a_shift(group, shift):
    logits, _ = logits_and_targets(padding=5)
    logits[0] = 0.0  # uniform: log of the vocabulary
    logits[1, :VOCAB_SIZE], logits[1, 4] = -1e3, 0.0  # certain: 0
    expected = plain_entropy(logits)
    found = entropy(logits + shift, VOCAB_SIZE, group)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=FLOAT32_TOLERANCE)
    assert expected[0] == pytest.approx(torch.tensor(VOCAB_SIZE).log().item())
    assert found[1] == 0.0


def test_no_positions_give_no_logprobs_but_a_gradient_path(group):
    logits = torch.randn(0, VOCAB_SIZE, requires_grad=True)
    found = token_logprobs(logits, torch.zeros(0, dtype=torch.int64), VOCAB_SIZE, group)
    assert found.shape == (0,) and found.dtype == torch.float32
    found.sum().backward()
    assert logits.grad.shape == logits.shape
    assert entropy(logits, VOCAB_SIZE, group).shape == (0,)


@pytest.mark.parametrize("target", [-100, VOCAB_SIZE])
def test_a_target_outside_the_vocabulary_is_refused(group, target):
    logits, targets = logits_and_targets(padding=5)
    targets[2] = target
    with pytest.raises(AssertionError):
        token_logprobs(logits, targets, VOCAB_SIZE, group)


def usable_and_targets():
    """A hole, an edge and a tail that are no token, and targets that are tokens."""
    usable = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    usable[[40, 41, 65, 66]], usable[120:] = False, False
    return usable, torch.tensor([0, 39, 42, 64, 67, 119, 5])


def only_tokens(logits, usable):
    """``[N, V]`` logits as Hugging Face would read them with the others at -inf."""
    return logits[:, :VOCAB_SIZE].masked_fill(~usable, float("-inf"))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ids_that_are_no_token_have_no_probability_and_no_gradient(group, temperature):
    logits, _ = logits_and_targets(padding=5)
    usable, targets = usable_and_targets()
    mine, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = token_logprobs(mine, targets, VOCAB_SIZE, group, temperature=temperature, usable=usable)
    expected = plain_logprobs(only_tokens(plain, usable), targets, temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT64_TOLERANCE)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad, rtol=0, atol=FLOAT64_TOLERANCE)
    assert not mine.grad[:, :VOCAB_SIZE][:, ~usable].any()
    own = only_tokens(logits, usable)[:, usable]
    spread = -(own.softmax(-1) * own.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(
        entropy(logits, VOCAB_SIZE, group, usable).double(), spread, rtol=0, atol=FLOAT32_TOLERANCE
    )
    everything = torch.ones_like(usable)
    again = token_logprobs(
        logits, targets, VOCAB_SIZE, group, temperature=temperature, usable=everything
    )
    assert torch.equal(
        again, token_logprobs(logits, targets, VOCAB_SIZE, group, temperature=temperature)
    )


def _on_two_ranks(logits, targets, temperature, usable=None):
    """This rank's results from its half of the columns."""
    vocab.CHUNK_POSITIONS = 3
    rank = dist.get_rank()
    mine = logits.chunk(2, dim=-1)[rank].clone().requires_grad_()
    found = token_logprobs(
        mine, targets, VOCAB_SIZE, dist.group.WORLD, temperature=temperature, usable=usable
    )
    (found * torch.arange(1.0, POSITIONS + 1)).sum().backward()
    whole = gather_logits(mine.detach().float(), VOCAB_SIZE, dist.group.WORLD)
    spread = entropy(mine, VOCAB_SIZE, dist.group.WORLD, usable)
    return found.detach(), mine.grad, spread, whole


@pytest.mark.distributed
@pytest.mark.parametrize("is_whole", [True, False])
def test_columns_split_over_two_ranks_with_padding_change_nothing(is_whole):
    logits, targets = logits_and_targets(padding=1)
    plain = logits.clone().requires_grad_()
    usable, others = usable_and_targets()
    usable, targets = (torch.ones_like(usable), targets) if is_whole else (usable, others)
    expected = plain_logprobs(only_tokens(plain, usable), targets, 0.7)
    (expected * torch.arange(1.0, POSITIONS + 1)).sum().backward()
    own = only_tokens(logits, usable)[:, usable]
    spread = -(own.softmax(-1) * own.log_softmax(-1)).sum(-1)
    results = run_on(2, _on_two_ranks, logits, targets, 0.7, usable)
    for found, _, uncertainty, whole in results:
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=FLOAT64_TOLERANCE)
        torch.testing.assert_close(uncertainty.double(), spread, rtol=0, atol=FLOAT32_TOLERANCE)
        assert torch.equal(whole, logits[:, :VOCAB_SIZE].float())
    gradient = torch.cat([grad for _, grad, _, _ in results], dim=-1)
    torch.testing.assert_close(gradient, plain.grad, rtol=0, atol=FLOAT64_TOLERANCE)
