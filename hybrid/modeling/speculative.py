"""Speculative decoding with a model's own multi-token prediction modules.

``generate(..., use_mtp=True)`` is transformers' assisted decoding (arXiv 2211.17192). In each round
every module drafts one token. The main model runs on all drafts at once and accepts those that it would
have chosen itself. The tokens are therefore those of plain decoding, greedy or sampled.

In a round with n tokens, the outputs h_1 .. h_{n-1} of the main stack are known. At position i, module k
reads the hidden state of the previous depth and token i + k. The token is final if i + k <= n, and a
draft otherwise. In the next round a module drops the positions whose token was a draft, and reads them
again with the new tokens. Its cache is cropped like that of the main model (see
``hybrid.modeling.cache_memory``), so layers with a state are supported.

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
    """One multi-token prediction module with its cache and position.

    Attributes:
        read: number of positions read so far.
        settled: number of these whose token was final, not a draft.
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
            mask: (1, T) of all positions, with 0 at padding; None for no padding.

        Returns:
            h^k of these positions, (1, t, D).
        """
        if self.read > self.settled:
            self.cache.crop(self.settled - self.read)
        out = self.module(hidden, embeddings, attention_mask=mask, cache=self.cache, use_cache=True)
        self.read = self.settled + hidden.shape[1]
        return out.last_hidden_state


class Tail:
    """Last hidden states of a growing sequence, whose end can be overwritten."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.states: torch.Tensor | None = None
        self.stop = 0
        """Position after the last state."""

    def write(self, states: torch.Tensor, start: int) -> None:
        """Write states (1, t, D) of positions from ``start`` on; overwrite earlier ones."""
        if self.states is not None:
            kept = self.states[:, : self.states.shape[1] - (self.stop - start)]
            self.states = torch.cat([kept, states], dim=1)
        else:
            self.states = states
        self.stop = start + states.shape[1]

    def read(self, start: int) -> torch.Tensor:
        """Return the states of positions from ``start`` on, and drop all but the last ``keep``."""
        assert self.states is not None
        states = self.states[:, self.states.shape[1] - (self.stop - start) :]
        self.states = self.states[:, -self.keep :].clone()
        return states


class MTPDrafts(CandidateGenerator):
    """Candidate generator of transformers' assisted decoding that drafts with a model's own modules.

    Raises:
        ValueError: the model has no multi-token prediction modules.
    """

    requires_model_outputs = True
    model_kwargs_overrides = {"output_last_hidden_state": True}

    def __init__(self, model: PreTrainedModel, generation_config: GenerationConfig) -> None:
        mtp = model.mtp
        if not isinstance(mtp, MultiTokenPrediction):
            raise ValueError(
                "use_mtp: expected a model with multi-token prediction modules, got one without"
                " (num_mtp_layers is 0); try use_mtp=False"
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
        """Number of tokens in the previous round; 1 at the start."""

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
        """Append drafts to ids (1, n): (1, n + drafts).

        Returns no draft logits (None): acceptance depends only on the main model.
        """
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
        """Draft one token per module, (1, depths); ``hidden``: new outputs of the main stack."""
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
        """Return the padding mask of the positions that modules read, (1, n - 1); None for none."""
        mask = (model_kwargs or {}).get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask[:, :-1].all():
            return None
        return mask[:, : total - 1]

    def update_candidate_strategy(
        self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        """Count accepted drafts."""
        self.mtp.accepted += int(num_matches)
