"""An independent reference: Hugging Face's model in float64 on one process, one row at a time.

Every loss is written here again from its formula (eq. 14-16 of the paper and the plain value, PRM
and NLL losses), token by token and without any of the package's losses, masks or engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

HEAD_FILE = "model.safetensors"


@dataclass(frozen=True)
class Row:
    """A prompt with its answer of n tokens and everything that any loss reads about it.

    All but ``tokens`` and ``labels`` ``[n, D]`` are ``[n]``, one entry a response token.
    """

    tokens: Tensor
    prompt_length: int
    mask: Tensor
    advantages: Tensor
    behaviour_logprobs: Tensor
    reference_logprobs: Tensor
    old_values: Tensor
    returns: Tensor
    labels: Tensor

    @property
    def num_response(self) -> int:
        return self.tokens.numel() - self.prompt_length


@dataclass(frozen=True)
class Hyper:
    """The numbers that losses and optimizer need."""

    temperature: float = 1.0
    clip_eps: float = 0.2
    clip_eps_high: float = 0.3
    value_clip_eps: float = 0.2
    beta: float = 0.3
    desirable_weight: float = 1.5
    undesirable_weight: float = 0.75
    kl_coef: float = 0.2
    denominator: str = "response"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-4  # AdamW: large enough to make the update a smooth function of the gradient
    weight_decay: float = 0.01
    max_grad_norm: float = 0.05


@dataclass(frozen=True)
class StepRecord:
    """Loss, gradient norm before clipping and gradients of one optimizer step.

    ``size`` is the loss without its terms' signs, by which the rounding of a sum is judged.
    """

    loss: float
    size: float
    grad_norm: float
    gradients: dict[str, Tensor]


def add_head(folder: Path, hidden: int, outputs: int, seed: int) -> None:
    """Gives a saved model a random linear head (``head.weight``, ``head.bias``)."""
    weights = load_file(folder / HEAD_FILE)
    generator = torch.Generator().manual_seed(seed)
    weights["head.weight"] = 0.2 * torch.randn(outputs, hidden, generator=generator)
    # Outputs lean to one side, so that the bias gradient is no sum of terms that cancel.
    weights["head.bias"] = 2.0 + 0.5 * torch.randn(outputs, generator=generator)
    save_file(weights, folder / HEAD_FILE, metadata={"format": "pt"})


class ReferenceModel:
    """The Hugging Face model in float64, its LM head or a linear head, and AdamW.

    Args:
        folder: Hugging Face folder, maybe with ``head.*`` in its safetensors file.
        with_head: use the linear head, so that the LM head (if untied) takes no part.
        hyper: optimizer settings.
    """

    def __init__(self, folder: Path, with_head: bool, hyper: Hyper):
        self.hyper = hyper
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        )
        # Hugging Face gives the padding token's embedding no gradient; here padding is the end
        # token too, which an answer holds and which learns.
        self.model.get_input_embeddings().padding_idx = None
        self.head = None
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        for module in self.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _Float64Norm(module)
        if with_head:
            self.parameters.pop("lm_head.weight", None)
            weights = load_file(folder / HEAD_FILE)
            self.head = nn.Linear(*weights["head.weight"].shape[::-1]).double()
            with torch.no_grad():
                self.head.weight.copy_(weights["head.weight"])
                self.head.bias.copy_(weights["head.bias"])
            self.parameters |= {f"head.{k}": v for k, v in self.head.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=hyper.lr,
            betas=hyper.betas,
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
        )

    def logprobs(self, row: Row) -> Tensor:
        """``[n]`` log-probs of the response tokens at the hyper-parameters' temperature."""
        logits = self.model(row.tokens[None]).logits[0] / self.hyper.temperature
        before = slice(row.prompt_length - 1, row.tokens.numel() - 1)
        response = row.tokens[row.prompt_length :]
        return logits[before].log_softmax(dim=-1)[torch.arange(row.num_response), response]

    def head_outputs(self, row: Row, shift: int) -> Tensor:
        """``[n, D]`` of the linear head at each response token (``shift`` 1: one before it)."""
        hidden = self.model.model(row.tokens[None]).last_hidden_state[0]
        return self.head(hidden)[row.prompt_length - shift : row.tokens.numel() - shift]

    def step(self, loss: Tensor, size: float) -> StepRecord:
        """Backward, clip by the global norm, AdamW."""
        self.optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.parameters.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        if norm > self.hyper.max_grad_norm:
            for parameter in self.parameters.values():
                parameter.grad.mul_(self.hyper.max_grad_norm / (norm + 1e-6))
        self.optimizer.step()
        return StepRecord(loss.item(), size, norm, gradients)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}


class _Float64Norm:
    """RMSNorm in the input's own precision; Hugging Face's casts to float32."""

    def __init__(self, norm: nn.Module):
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()


def ppo_actor(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """Eq. 14: ``-1/N sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) M_t``."""
    total, count = 0.0, 0
    for row in rows:
        logprobs = model.logprobs(row)
        for t in range(row.num_response):
            kept = bool(row.mask[t])
            if kept:
                advantage = row.advantages[t].double()
                total = total + _surrogate(model, row, logprobs, t, advantage)
            count += 1 if model.hyper.denominator == "response" else int(kept)
        total = total + 0.0 * logprobs.sum()
    return total / count


def ppo_actor_kl(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """Eq. 14 and the mean of ``kl_coef (log pi_t/pi_ref_t)^2 / 2`` over all response tokens."""
    total, count = 0.0, 0
    for row in rows:
        logprobs = model.logprobs(row)
        for t in range(row.num_response):
            total = total + (logprobs[t] - row.reference_logprobs[t]) ** 2 / 2
            count += 1
    return ppo_actor(model, rows) + model.hyper.kl_coef * total / count


def _surrogate(
    model: ReferenceModel,
    row: Row,
    logprobs: Tensor,
    t: int,
    advantage: Tensor,
    high: float | None = None,
) -> Tensor:
    """``-min(rho_t A, clip(rho_t, 1 - eps, 1 + eps_high) A)`` of a token."""
    ratio, eps = torch.exp(logprobs[t] - row.behaviour_logprobs[t]), model.hyper.clip_eps
    clipped = torch.clamp(ratio, 1 - eps, 1 + (eps if high is None else high))
    return -torch.minimum(ratio * advantage, clipped * advantage)


def grpo_token(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """``1/N sum_t surrogate_t M_t + kl_coef/T sum_t k3_t`` with one advantage an answer.

    T counts response tokens, N them or the kept ones.
    """
    return _grpo(model, rows, by_row=False)


def grpo_sequence(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """The mean over answers of the means over their tokens."""
    return _grpo(model, rows, by_row=True)


def _grpo(model: ReferenceModel, rows: list[Row], by_row: bool) -> Tensor:
    hyper, total, count, kl_total, kl_count = model.hyper, 0.0, 0, 0.0, 0
    for row in rows:
        logprobs, own, counted, kl = model.logprobs(row), 0.0, 0, 0.0
        advantage = row.advantages[0].double()
        for t in range(row.num_response):
            kept = bool(row.mask[t])
            if kept:
                own = own + _surrogate(model, row, logprobs, t, advantage, hyper.clip_eps_high)
            back = row.reference_logprobs[t] - logprobs[t]
            kl = kl + hyper.kl_coef * (torch.exp(back) - 1 - back)
            counted += 1 if hyper.denominator == "response" else int(kept)
        if by_row:
            total = total + (own / counted if counted else 0.0) + kl / row.num_response
            count += 1
        else:
            total, count = total + own, count + counted
            kl_total, kl_count = kl_total + kl, kl_count + row.num_response
    return total / count + (kl_total / kl_count if kl_count else 0.0)


def mismatched(rows: list[Row]) -> list[Row]:
    """Each row's prompt with the answer of the other row of its pair.

    The answer keeps its mask; the reference's log-probs lie below the policy's (z0 is above 0).
    """
    pairs = []
    for place, row in enumerate(rows):
        other = rows[place ^ 1]
        tokens = torch.cat([row.tokens[: row.prompt_length], other.tokens[other.prompt_length :]])
        lower = other.reference_logprobs - 1.0
        pairs.append(
            replace(other, tokens=tokens, prompt_length=row.prompt_length, reference_logprobs=lower)
        )
    return pairs


def kto(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """``1/B sum w (1 - sigmoid(beta s (r - z0)))``, s and w by the label; even rows are chosen."""

    def logratio(row: Row) -> Tensor:
        return ((model.logprobs(row) - row.reference_logprobs) * row.mask.double()).sum()

    with torch.no_grad():
        z0 = sum(logratio(row) for row in mismatched(rows)) / len(rows)
    assert z0 > 0, "the reference point is to be tested"
    hyper, total = model.hyper, 0.0
    for place, row in enumerate(rows):
        sign, weight = 1, hyper.desirable_weight
        if place % 2 == 1:
            sign, weight = -1, hyper.undesirable_weight
        total = total + weight * (1 - torch.sigmoid(hyper.beta * sign * (logratio(row) - z0)))
    return total / len(rows)


def orm(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """Eq. 1: ``-1/P sum log sigmoid(r_w - r_l)`` at the last tokens."""
    total = 0.0
    for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True):
        rewards = [model.head_outputs(row, shift=0)[-1, 0] for row in (chosen, rejected)]
        total = total - torch.log(torch.sigmoid(rewards[0] - rewards[1]))
    return total / (len(rows) // 2)


def ppo_critic(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """``1/N sum_t max((V - G)^2, (V_old + clip(V - V_old) - G)^2) / 2``; no mask."""
    eps, total, count = model.hyper.value_clip_eps, 0.0, 0
    for row in rows:
        values = model.head_outputs(row, shift=1)[:, 0]
        for t in range(row.num_response):
            old, target = row.old_values[t].double(), row.returns[t].double()
            clipped = old + torch.clamp(values[t] - old, -eps, eps)
            total = total + torch.maximum((values[t] - target) ** 2, (clipped - target) ** 2) / 2
            count += 1
    return total / count


def dpo_inside(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """``-1/P sum log sigmoid(beta (sum_w M log pi/pi_ref - sum_l M log pi/pi_ref))``."""
    return _dpo(model, rows, inside=True)


def dpo_pair(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """Eq. 15 as printed: a pair's plain log-sigmoid times the kept share of its tokens."""
    return _dpo(model, rows, inside=False)


def _dpo(model: ReferenceModel, rows: list[Row], inside: bool) -> Tensor:
    total, pairs = 0.0, 0
    for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True):
        sums = []
        for row in (chosen, rejected):
            logratio = model.logprobs(row) - row.reference_logprobs
            sums.append((logratio * (row.mask.double() if inside else 1.0)).sum())
        kept = int(chosen.mask.sum() + rejected.mask.sum())
        weight = 1.0 if inside else kept / (chosen.num_response + rejected.num_response)
        margin = model.hyper.beta * (sums[0] - sums[1])
        total = total - weight * torch.log(torch.sigmoid(margin))
        pairs += 1
    return total / pairs


def rejection_sampling_k2(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """Eq. 16: ``-1/N sum_t M_t log pi_t`` and the mean of ``kl_coef (log pi_t/pi_ref_t)^2 / 2``."""
    return _rejection_sampling(model, rows, lambda logratio: logratio**2 / 2)


def rejection_sampling_k3(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """Eq. 16 with ``pi_ref/pi - 1 - log pi_ref/pi`` for the KL."""
    return _rejection_sampling(model, rows, lambda r: torch.exp(-r) - 1 + r)


def _rejection_sampling(model: ReferenceModel, rows: list[Row], kl: Callable) -> Tensor:
    total, count, kl_total, kl_count = 0.0, 0, 0.0, 0
    for row in rows:
        logprobs = model.logprobs(row)
        for t in range(row.num_response):
            kept = bool(row.mask[t])
            if kept:
                total = total - logprobs[t]
            kl_total = kl_total + kl(logprobs[t] - row.reference_logprobs[t])
            count += 1 if model.hyper.denominator == "response" else int(kept)
            kl_count += 1
    return total / count + model.hyper.kl_coef * kl_total / kl_count


def prm_bce(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """Mean over labelled tokens and attributes of ``-(y log p + (1 - y) log(1 - p))``."""

    def term(output: Tensor, label: Tensor) -> Tensor:
        probability = torch.sigmoid(output)
        return -(label * torch.log(probability) + (1 - label) * torch.log(1 - probability))

    return _prm(model, rows, term)


def prm_mse(model: ReferenceModel, rows: list[Row]) -> Tensor:
    """Mean over labelled tokens and attributes of the squared error."""
    return _prm(model, rows, lambda output, label: (output - label) ** 2)


def _prm(model: ReferenceModel, rows: list[Row], term: Callable) -> Tensor:
    total, count = 0.0, 0
    for row in rows:
        outputs = model.head_outputs(row, shift=0)
        for t in range(row.num_response):
            if bool(row.mask[t]):
                width = outputs.shape[1]
                total = total + term(outputs[t], row.labels[t, :width].double()).sum() / width
                count += 1
    return total / count


LOSSES: dict[str, Callable[[ReferenceModel, list[Row]], Tensor]] = {
    "prm_bce": prm_bce,
    "prm_mse": prm_mse,
    "ppo_actor": ppo_actor,
    "ppo_actor_kl": ppo_actor_kl,
    "ppo_critic": ppo_critic,
    "grpo_token": grpo_token,
    "grpo_sequence": grpo_sequence,
    "kto": kto,
    "orm": orm,
    "dpo_inside": dpo_inside,
    "dpo_pair": dpo_pair,
    "rejection_sampling_k2": rejection_sampling_k2,
    "rejection_sampling_k3": rejection_sampling_k3,
}


def train(
    folder: Path, loss: str, steps: list[list[Row]], hyper: Hyper
) -> tuple[list[StepRecord], dict[str, Tensor]]:
    """One optimizer step on each list of rows; records and final weights."""
    with_head = loss.startswith(("prm", "orm", "ppo_critic"))
    model = ReferenceModel(folder, with_head, hyper)
    records = [
        model.step(LOSSES[loss](model, rows), size_of_terms(model, loss, rows)) for rows in steps
    ]
    return records, model.weights()


def size_of_terms(model: ReferenceModel, loss: str, rows: list[Row]) -> float:
    """The loss with all advantages negative, so that no terms cancel; no other loss has signs."""
    rows = [replace(row, advantages=-row.advantages.abs()) for row in rows]
    with torch.no_grad():
        return float(LOSSES[loss](model, rows))


def random_rows(
    policy_folder: Path, value_folder: Path, sizes: list[int], vocab_size: int, hyper: Hyper
) -> list[list[Row]]:
    """Random batches of the given sizes; ragged, answers of one token among them.

    Behaviour and reference log-probs lie around the policy's, old values around the critic's, so
    that some tokens are clipped and most are not.
    """
    policy = ReferenceModel(policy_folder, False, hyper)
    critic = ReferenceModel(value_folder, True, hyper)
    random = torch.Generator().manual_seed(20)
    batches = []
    for size in sizes:
        batch = []
        for _ in range(size):
            prompt, answer = (int(torch.randint(1, n, (), generator=random)) for n in (7, 9))
            tokens = torch.randint(0, vocab_size, (prompt + answer,), generator=random)
            noise = torch.randn(6, answer, generator=random)
            blank = Row(tokens, prompt, *[noise[0]] * 7)
            with torch.no_grad():
                logprobs = policy.logprobs(blank).float()
                values = critic.head_outputs(blank, shift=1)[:, 0].float()
            row = replace(
                blank,
                mask=torch.rand(answer, generator=random) < 0.5,
                advantages=noise[0],
                behaviour_logprobs=logprobs + 0.2 * noise[1],
                reference_logprobs=logprobs + 0.5 * noise[2],
                old_values=values + 0.3 * noise[3],
                returns=values + 0.5 + noise[4],
                labels=torch.rand(answer, 5, generator=random),
            )
            batch.append(row)
        batches.append(batch)
    return batches


def mask_all_but(batch: list[Row], first: int) -> list[Row]:
    """The rows from ``first`` on without a kept token."""
    none = [replace(row, mask=torch.zeros_like(row.mask)) for row in batch[first:]]
    return batch[:first] + none


def unmask(batch: list[Row]) -> list[Row]:
    """Every response token kept."""
    return [replace(row, mask=torch.ones_like(row.mask)) for row in batch]
