"""Options of a mixture of experts.

Shapes: D model dim, E experts, k experts per token, I width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from hybrid.config.declare import NotNegative, Positive, Size, Size0
from hybrid.config.sizes import Sizes
from hybrid.ffn.base import FeedForwardOptions
from hybrid.ffn.dense import DenseOptions


@dataclass(frozen=True)
class MoEOptions(FeedForwardOptions):
    """Options of ``mixture_of_experts``.

    Attributes:
        num_experts: E, number of routed experts.
        top_k: k, routed experts per token.
        intermediate_size: I, inner width of an expert. By default, all experts of a token together
            are as wide as the default of ``dense``. The granularity is 2 D / I.
        activation: as in ``dense``; or ``clamped_swiglu``: (up + 1) * gate * sigmoid(swiglu_alpha *
            gate) with gate clamped to at most ``swiglu_limit`` and up to [-swiglu_limit,
            swiglu_limit] (gpt-oss, arXiv 2508.10925).
        swiglu_alpha, swiglu_limit: constants of ``clamped_swiglu``.
        bias: add biases to the projections of the experts (gpt-oss).
        latent_size: input and output dim of the routed experts, between two projections that all
            experts share (Nemotron 3); default D.
        num_shared_experts: number of experts for every token (arXiv 2401.06066), computed as one
            feed-forward of width ``num_shared_experts * shared_intermediate_size``.
        shared_intermediate_size: inner width of a shared expert; default I.
        shared_gate: multiply the shared experts by sigmoid(w x) (Qwen2-MoE, Qwen3-Next).
        router_bias: add a learned bias to the router's logits (gpt-oss).
        score_function: ``softmax`` over the experts (Mixtral, Qwen3-MoE), or ``sigmoid`` of each
            (DeepSeek-V3).
        normalize_weights: normalise the weights of a token's k experts to sum to one. With
            ``softmax`` this is a softmax over the logits of these k experts (Mixtral, Granite,
            gpt-oss).
        normalize_epsilon: epsilon added to that sum (1e-6 in LFM2).
        scaling_factor: factor of the weights, after normalisation.
        num_groups, top_k_groups: experts form ``num_groups`` equal groups. A token chooses among
            the experts of its ``top_k_groups`` best groups (DeepSeek-V2, V3).
        group_score: score of a group: the sum of its two best experts (``top2``, DeepSeek-V3), or
            its best expert (``max``, DeepSeek-V2).
        score_correction_bias: add a bias per expert to the scores for the choice only. It is a
            buffer, not a parameter. ``bias_update_rate`` implies it.
        bias_update_rate: gamma of loss-free balancing (arXiv 2408.15664; 0.001 in 2412.19437).
            After each optimizer step, the bias of an expert increases by gamma if it had fewer
            tokens than the mean, and decreases by gamma if it had more. 0: constant bias.
        balance_loss: alpha of the auxiliary loss alpha * E * sum_i f_i P_i per layer (arXiv
            2101.03961, eq. 4). f_i is the share of choices of expert i, P_i its mean probability.
            The loss is alpha for a uniform load, independent of E and k.
        balance_statistics: tokens counted in f_i: ``local`` (this process and forward), or
            ``global`` (all processes, and all forwards since the last optimizer step; arXiv
            2501.11873).
        sequence_balance_loss: alpha of the same loss with f and P of each row of the batch, as a
            mean over rows (arXiv 2412.19437, eq. 17-20; 0.0001 there).
        router_z_loss: lambda of lambda * mean(logsumexp(logits)^2) per layer (arXiv 2202.08906,
            eq. 5; 0.001 there).
    """

    num_experts: Size = 8
    top_k: Size = 2
    intermediate_size: Size | None = None
    activation: Literal[
        "swiglu", "geglu", "geglu_tanh", "reglu", "relu2", "gelu", "silu", "clamped_swiglu"
    ] = "swiglu"
    swiglu_alpha: float = 1.702
    swiglu_limit: Positive = 7.0
    bias: bool = False
    latent_size: Size | None = None
    num_shared_experts: Size0 = 0
    shared_intermediate_size: Size | None = None
    shared_gate: bool = False
    router_bias: bool = False
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool = True
    normalize_epsilon: Positive = 1e-20
    scaling_factor: Positive = 1.0
    num_groups: Size = 1
    top_k_groups: Size = 1
    group_score: Literal["top2", "max"] = "top2"
    score_correction_bias: bool = False
    bias_update_rate: NotNegative = 0.0
    balance_loss: NotNegative = 0.0
    balance_statistics: Literal["local", "global"] = "global"
    sequence_balance_loss: NotNegative = 0.0
    router_z_loss: NotNegative = 0.0

    def complete(self, hidden_size: int) -> MoEOptions:
        """Return these options with the widths filled in."""
        inner = self.intermediate_size
        if inner is None:
            whole = DenseOptions(activation=self.dense_activation).complete(hidden_size)
            assert whole.intermediate_size is not None
            inner = 32 * max(1, whole.intermediate_size // max(1, self.active_experts) // 32)
        shared = self.shared_intermediate_size
        if self.num_shared_experts and shared is None:
            shared = inner
        return replace(self, intermediate_size=inner, shared_intermediate_size=shared)

    @property
    def dense_activation(self) -> Any:
        """Activation of ``dense`` with the same projections as this one."""
        return "swiglu" if self.activation == "clamped_swiglu" else self.activation

    @property
    def shared_options(self) -> DenseOptions:
        """Options of the feed-forward that computes all shared experts, of completed options."""
        assert self.shared_intermediate_size is not None
        return DenseOptions(
            intermediate_size=self.num_shared_experts * self.shared_intermediate_size,
            activation=self.dense_activation,
            bias=self.bias,
        )

    @property
    def has_correction_bias(self) -> bool:
        """Whether the choice uses a correction bias per expert."""
        return self.score_correction_bias or self.bias_update_rate > 0

    @property
    def has_losses(self) -> bool:
        """Whether training adds a balance loss."""
        return max(self.balance_loss, self.sequence_balance_loss, self.router_z_loss) > 0

    @property
    def total_experts(self) -> int:
        """Number of experts, routed and shared."""
        return self.num_experts + self.num_shared_experts

    @property
    def active_experts(self) -> int:
        """Number of experts per token, routed and shared."""
        return self.top_k + self.num_shared_experts

    @property
    def activation_ratio(self) -> float:
        """Ratio of active to total experts."""
        return self.active_experts / self.total_experts

    @property
    def sparsity(self) -> float:
        """Ratio of total to active experts."""
        return self.total_experts / self.active_experts

    def granularity(self, hidden_size: int) -> float:
        """Return the granularity G = 2 D / I, of completed options."""
        assert self.intermediate_size is not None
        return 2 * hidden_size / self.intermediate_size

    def problems(self, sizes: Sizes) -> list[str]:
        """Return an error line for each mismatch of experts, groups and shared experts."""
        return [*self._routing_problems(), *self._shared_problems()]

    def _routing_problems(self) -> list[str]:
        experts, groups, kept = self.num_experts, self.num_groups, self.top_k_groups
        if self.top_k > experts:
            return [f"top_k: expected at most num_experts {experts}, got {self.top_k}"]
        if experts % groups:
            fit = [g for g in range(1, experts + 1) if experts % g == 0]
            near = [max(g for g in fit if g < groups), *(g for g in fit if g > groups)][:2]
            return [
                f"num_groups: expected a divisor of num_experts {experts}, got {groups}; try"
                f" {' or '.join(map(str, near))}"
            ]
        lines = []
        size = experts // groups
        if kept > groups:
            lines.append(f"top_k_groups: expected at most num_groups {groups}, got {kept}")
        elif self.top_k > kept * size:
            lines.append(
                f"top_k: expected at most {kept * size}, the experts in top_k_groups {kept} of"
                f" {size} each, got {self.top_k}"
            )
        if groups > 1 and size < 2 and self.group_score == "top2":
            lines.append(
                f"group_score: expected 'max' for groups of one expert (num_groups {groups},"
                f" num_experts {experts}), got 'top2'"
            )
        return lines

    def _shared_problems(self) -> list[str]:
        if self.num_shared_experts:
            if self.activation != "clamped_swiglu":
                return []
            return [
                "activation: expected another than 'clamped_swiglu' with num_shared_experts"
                f" {self.num_shared_experts}; try 'swiglu'"
            ]
        given = [n for n in ("shared_intermediate_size", "shared_gate") if getattr(self, n)]
        return [f"{name}: expected the default with num_shared_experts: 0" for name in given]
