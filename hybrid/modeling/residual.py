"""Residual branches: norms and multipliers around each branch, and parallel mixers in one branch.

Shapes: B batch, T time, D model dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from hybrid.config.block_options import scaled
from hybrid.config.spec import BranchSpec, LayerSpec
from hybrid.mixers import Mixer
from hybrid.nn.norms import build_norm


class ParallelMixers(nn.Module):
    """Parallel mixers with combined outputs (Falcon-H1, arXiv 2507.22448; Hymba, arXiv 2411.13676).

    ``parallel_combine`` selects the combination of y_i = output_i * f_i(input_i * x):

        sum             sum_i y_i (Falcon-H1)
        mean            1/n sum_i y_i
        concat          [y_1, ..., y_n] W, W (n D, D)
        learned         1/n sum_i norm_i(y_i), each norm with its own weight (Hymba, section 2.1)
        learned_scalar  sum_i a_i y_i, with scalars a_i initialised to 1/n
    """

    residual_projections = ("projection",)

    def __init__(self, spec: LayerSpec, mixers: list[Mixer]) -> None:
        super().__init__()
        assert spec.mixer_branch is not None
        self.branches = nn.ModuleList(mixers)
        self.combine = spec.combine
        self.multipliers = [(m.input_multiplier, m.output_multiplier) for m in spec.mixers]
        d_model, count = spec.hidden_size, len(mixers)
        self.norms = self.projection = self.weights = None
        branch = spec.mixer_branch
        if self.combine == "learned":
            self.norms = nn.ModuleList(
                [build_norm(branch.norm, d_model, branch.norm_eps) for _ in mixers]
            )
        if self.combine == "concat":
            self.projection = nn.Linear(count * d_model, d_model, bias=False)
        if self.combine == "learned_scalar":
            self.weights = nn.Parameter(torch.empty(count))

    def init_parameters(self, std: float) -> None:
        """Initialise the scalars to 1 / n."""
        if self.weights is not None:
            init.constant_(self.weights, 1 / len(self.branches))

    def forward(self, x: torch.Tensor, branch_kwargs: list[dict[str, Any]]) -> torch.Tensor:
        """Map x (B, T, D) to (B, T, D); ``branch_kwargs`` has the keyword arguments of each mixer."""
        outputs = [
            scaled(branch(scaled(x, scale_in), **kwargs)[0], scale_out)
            for branch, (scale_in, scale_out), kwargs in zip(
                self.branches, self.multipliers, branch_kwargs, strict=True
            )
        ]
        if self.projection is not None:
            return self.projection(torch.cat(outputs, dim=-1))
        if self.norms is not None:
            outputs = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        if self.weights is not None:
            outputs = [y * weight for y, weight in zip(outputs, self.weights, strict=True)]
        total = torch.stack(outputs).sum(dim=0)
        return total / len(outputs) if self.combine in ("mean", "learned") else total


class Residual(nn.Module):
    """Norms and multipliers of one residual branch, x + f(x) and its variants.

    ``norm_position`` selects the variant. a, i, o are the multipliers of the residual stream, of the
    branch's input, and of its output; n and m are norms:

        pre        a x + o f(i n(x))
        post       n(a x + o f(i x))
        reordered  a x + o n(f(i x))
        sandwich   a x + o m(f(i n(x)))
        normed     a n(x) + o f(i n(x))
    """

    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        self.position = spec.norm_position
        self.skip_multiplier = spec.skip_multiplier
        self.input_multiplier = spec.input_multiplier
        self.output_multiplier = spec.output_multiplier
        self.norm_in = self.norm_out = None
        if self.position in ("pre", "sandwich", "normed"):
            self.norm_in = build_norm(spec.norm, spec.input_size, spec.norm_eps)
        if self.position in ("post", "sandwich", "reordered"):
            self.norm_out = build_norm(spec.norm, spec.hidden_size, spec.norm_eps)

    def enter(
        self, x: torch.Tensor, source: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input of the branch, and the stream that its output is added to.

        Args:
            x: residual stream, (B, T, D).
            source: input of the branch if it is not the stream, (B, T, C).
        """
        h = x if source is None else source
        if self.norm_in is not None:
            h = self.norm_in(h)
        return scaled(h, self.input_multiplier), h if self.position == "normed" else x

    def leave(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the residual stream after adding the branch's output y, (B, T, D)."""
        if self.norm_out is not None and self.position != "post":
            y = self.norm_out(y)
        y = scaled(y, self.output_multiplier)
        if self.skip_multiplier != 0:
            y = scaled(x, self.skip_multiplier) + y
        return self.norm_out(y) if self.norm_out is not None and self.position == "post" else y
