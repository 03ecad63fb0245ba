"""Speculative decoding with a model's own multi-token prediction modules.

`generate(..., use_mtp=True)` is transformers' assisted decoding (arXiv 2211.17192): each round the
modules propose one token each, the main model runs on all of them at once, and what it would have
chosen otherwise is chosen. So the tokens are those of plain decoding, greedy or sampled.

At a round with n tokens the main stack's outputs h_1 .. h_{n-1} are known. Module k reads, at position
i, what the depth before it says there and the token i + k; that token is settled where i + k <= n and
a draft beyond. Each round a module takes back the positions whose token was a draft, and reads them
again with the ones that are new. Its cache is rolled back as that of the main model is (see
`hybrid.nn.cache`), so layers with a state take part.

Shapes: B batch, here 1; T time, D model dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation.candidate_generator import CandidateGenerator

from hybrid.modeling.mtp import MTPModule, MultiTokenPrediction


class Depth:
    """One module, its cache, and what it has read.

    Attributes:
        read: positions read so far.
        settled: how many of them have read a token that is no draft.
    """

    def __init__(self, module: MTPModule, k: int) -> None:
        self.module, self.k = module, k
        self.cache = DynamicCache(config=module.stack.config)
        if k > 1:  # the first module never reads a draft
            self.cache.activate_past_recording()
        self.read = self.settled = 0

    def read_on(
        self,
        hidden: torch.Tensor,
        embeddings: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Read positions from the first unsettled one on.

        Args:
            hidden, embeddings: (1, t, D), of these positions.
            mask: (1, T) of all positions, with 0 at padding; None for none.

        Returns:
            (1, t, D), h^k of these positions.
        """
        if self.read > self.settled:
            self.cache.crop(self.settled - self.read)
        out = self.module(hidden, embeddings, attention_mask=mask, cache=self.cache, use_cache=True)
        self.read = self.settled + hidden.shape[1]
        return out.last_hidden_state


class Tail:
    """The end of a sequence of hidden states that grows, and whose end is written anew."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.states: torch.Tensor | None = None
        self.stop = 0
        """Position after the last."""

    def write(self, states: torch.Tensor, start: int) -> None:
        """States (1, t, D) of positions from `start` on, in the place of any that were there."""
        if self.states is not None:
            kept = self.states[:, : self.states.shape[1] - (self.stop - start)]
            self.states = torch.cat([kept, states], dim=1)
        else:
            self.states = states
        self.stop = start + states.shape[1]

    def read(self, start: int) -> torch.Tensor:
        """States of positions from `start` on; those far before it are let go."""
        assert self.states is not None
        found = self.states[:, self.states.shape[1] - (self.stop - start) :]
        self.states = self.states[:, -self.keep :].clone()
        return found


class MTPDrafts(CandidateGenerator):
    """Drafts of a model's modules, as transformers' assisted decoding asks for them.

    Raises:
        ValueError: the model has no modules.
    """

    requires_model_outputs = True
    model_kwargs_overrides = {"output_last_hidden_state": True}

    def __init__(self, model: PreTrainedModel, generation_config: GenerationConfig) -> None:
        mtp = model.mtp
        if not isinstance(mtp, MultiTokenPrediction):
            raise ValueError(
                "use_mtp: this model has no multi-token prediction modules (num_mtp_layers is 0)"
            )
        self.model: Any = model
        self.mtp = mtp
        self.mtp.drafted = self.mtp.accepted = 0
        self.max_length = generation_config.max_length
        self.eos = getattr(generation_config, "_eos_token_tensor", None)
        depths: Any = enumerate(mtp.depths, start=1)
        self.depths = [Depth(module, k) for k, module in depths]
        self.tails = [Tail(len(self.depths) + 1) for _ in self.depths]
        self.before = 1
        """Tokens of the round before; at first the one that has nothing before it."""

    @torch.no_grad()
    def get_candidates(
        self,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(1, n) -> (1, n + drafts). None for their logits: whether one is taken hangs on it alone."""
        total = input_ids.shape[1]
        room = self.max_length - total - 1
        if is_first_iteration or room < 1:
            return input_ids, None
        hidden = model_outputs.last_hidden_state[:, : total - self.before]
        drafts = self._draft(input_ids, hidden, self._mask(model_kwargs, total))[:, :room]
        self.before = total
        if self.eos is not None:
            ends = torch.isin(drafts[0], self.eos.to(drafts.device)).nonzero()
            if len(ends):
                drafts = drafts[:, : int(ends[0]) + 1]
        self.mtp.drafted += drafts.shape[1]
        return torch.cat([input_ids, drafts], dim=1), None

    def _draft(
        self, ids: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """One token of each module, (1, n). `hidden` are the main stack's outputs that are new."""
        known = ids.shape[1]
        self.tails[0].write(hidden, self.before - 1)
        for depth, tail in zip(self.depths, self.tails, strict=True):
            start = depth.settled
            embeddings = self.model.get_input_embeddings()(ids[:, start + depth.k :])
            states = depth.read_on(tail.read(start), embeddings, mask)
            depth.settled = max(0, known - depth.k)
            if depth.k < len(self.depths):
                self.tails[depth.k].write(states, start)
            token = self.model.compute_logits(states[:, -1:]).argmax(dim=-1)
            ids = torch.cat([ids, token.to(ids.device)], dim=1)
        return ids[:, known:]

    def _mask(self, model_kwargs: dict[str, Any] | None, total: int) -> torch.Tensor | None:
        """The padding of the positions that modules read, (1, n - 1)."""
        mask = (model_kwargs or {}).get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask[:, :-1].all():
            return None
        return mask[:, : total - 1]

    def update_candidate_strategy(
        self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        """Count what was taken."""
        self.mtp.accepted += int(num_matches)
