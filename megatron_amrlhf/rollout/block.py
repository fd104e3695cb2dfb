"""A decoding micro-batch: the rows that go through the pipeline together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_amrlhf.models.attention import KVCache
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.rollout.sampling import SamplingSettings


class DecodeBlock:
    """State of the rows of one micro-batch; equal on every rank of a replica.

    Every rank gets the same tokens, so each knows by itself which rows ended, which to drop from
    its cache, and when the block is done: no further agreement is needed.

    Attributes:
        module: the stage that decodes these rows (policy's or reference's).
        places: ``[b]`` index of each live row in the batch.
        answers: answer tokens so far, by place in the batch.
        ended: places whose answer ended on an end token.
    """

    def __init__(
        self,
        module: StageModel,
        places: list[int],
        prompts: list[Tensor],
        *,
        uniform: Tensor,
        settings: SamplingSettings,
        device: torch.device,
    ):
        self.module, self.settings, self.device = module, settings, device
        self.places = torch.tensor(places, dtype=torch.int64)
        self.uniform = uniform
        self.answers: dict[int, list[int]] = {place: [] for place in places}
        self.ended: set[int] = set()
        lengths = torch.tensor([prompt.numel() for prompt in prompts], dtype=torch.int64)
        room = (settings.max_row_tokens - lengths).clamp(max=settings.max_new_tokens)
        self._limit = dict(zip(places, room.tolist(), strict=True))
        # A prompt goes in once, whatever the number of its answers.
        first_rows: dict[bytes, int] = {}
        of_row = [first_rows.setdefault(x.numpy().tobytes(), len(first_rows)) for x in prompts]
        distinct = {place: prompt for place, prompt in zip(of_row, prompts, strict=True)}
        # Padded on the right: decoded tokens take the place of the padding in the cache.
        tokens = torch.zeros(len(distinct), int(lengths.max()), dtype=torch.int64)
        for place, prompt in distinct.items():
            tokens[place, : prompt.numel()] = prompt
        self._tokens = tokens.to(device)
        self._prompts = torch.tensor(of_row, dtype=torch.int64, device=device)
        self._prompt_lengths = torch.tensor([distinct[x].numel() for x in range(len(distinct))])
        self._live = torch.ones(len(prompts), dtype=torch.bool)
        # Rows that have ended run along, so the longest prompt may meet the largest room.
        capacity = int(lengths.max()) + int(room.max())
        self.caches = [KVCache(lengths.to(device), self._prompts, capacity) for _ in module.chunks]

    @property
    def done(self) -> bool:
        return not bool(self._live.any())

    @property
    def num_rows(self) -> int:
        """``b``, the rows that a token is sampled for."""
        return self.places.numel()

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        """``[T, b, H]`` of the activations that the next forward passes between stages.

        While prompts go in, ``b`` counts distinct ones.
        """
        return (self._tokens.shape[1], self._tokens.shape[0], self.module.config.hidden_size)

    def forward(self, chunk: int, hidden: Tensor | None) -> Tensor:
        """Runs a chunk on the prompts or the last tokens; ``[b, V / TP]`` on the last one."""
        stage: Any = self.module.chunks[chunk]
        cache = self.caches[chunk]
        if hidden is not None:
            stage.set_input_tensor([hidden])
        lengths = cache.lengths
        if cache.keys:
            out = stage(self._tokens, positions=lengths[:, None], rows=cache)
            cache.lengths = lengths + 1  # only now: every layer has written at the old one
            return out
        count, width = self._tokens.shape
        # The prompts' last tokens in the flattened [P, T]: what follows them is sampled.
        index = torch.arange(count) * width + self._prompt_lengths - 1
        out = stage(self._tokens, output_index=index.to(self.device), rows=cache)
        return out[self._prompts] if stage.post_process else out

    def draw(self) -> Tensor:
        """``[b]`` uniforms for the token that comes next in each row."""
        counts = [len(self.answers[place]) for place in self.places.tolist()]
        # A row that has ended may have used up its numbers; what it gets is not read.
        index = torch.tensor(counts).clamp(max=self.uniform.shape[1] - 1)
        return self.uniform.gather(1, index[:, None])[:, 0]

    def accept(self, tokens: Tensor) -> int:
        """Takes the sampled ``[b]`` tokens; returns how many rows ended by them."""
        newly_done = 0
        for row, (place, token) in enumerate(
            zip(self.places.tolist(), tokens.tolist(), strict=True)
        ):
            if not self._live[row]:
                continue
            self.answers[place].append(token)
            is_end = token in self.settings.end_ids
            if is_end:
                self.ended.add(place)
            if is_end or len(self.answers[place]) >= self._limit[place]:
                self._live[row] = False
                newly_done += 1
        self._tokens = tokens.to(self.device)[:, None]
        # Dropping rows copies the cache, so not for each one that ends.
        if not self.done and int(self._live.sum()) * 2 <= self._live.numel():
            self._drop_ended()
        return newly_done

    def _drop_ended(self) -> None:
        keep = self._live.nonzero()[:, 0]
        self.places, self.uniform = self.places[keep], self.uniform[keep]
        self._live = self._live[keep]
        on_device = keep.to(self.device)
        self._tokens = self._tokens[on_device]
        for cache in self.caches:
            cache.keep(on_device)
