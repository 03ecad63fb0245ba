"""Training losses of a hybrid language model: next tokens, multi-token prediction, expert balance.

Shapes: B batch, T time, N = B * T tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from hybrid.config.hybrid_config import HybridConfig
from hybrid.ffn import balance
from hybrid.modeling.losses import (
    IGNORED,
    cross_entropy,
    next_tokens,
    of_logits,
    transform_logits,
)
from hybrid.modeling.outputs import HybridOutput
from hybrid.nn.input_checks import check_count, check_labels, explain_index

logger = logging.get_logger(__name__)

BALANCE_OPTIONS = ("balance_loss", "sequence_balance_loss", "router_z_loss", "bias_update_rate")


def own_losses(config: HybridConfig) -> tuple[str, ...]:
    """Return the config keys that add to the next-token loss in training, or update router biases."""
    names = ["z_loss"] if config.z_loss else []
    names += ["num_mtp_layers"] if config.num_mtp_layers else []
    names += [
        f"feed_forwards.{symbol}.{name}"
        for symbol, part in config.stack.feed_forwards.items()
        for name in BALANCE_OPTIONS
        if getattr(part.options, name, 0)
    ]
    return tuple(names)


def warn_of_skipped_losses(names: tuple[str, ...]) -> None:
    """Warn once of the config keys that do not affect a training loss computed outside the model."""
    if names and not torch.compiler.is_compiling():
        logger.warning_once(
            "the model runs in training mode without labels, so these keys of its config add nothing to"
            f" the loss: {', '.join(names)}; HybridForCausalLM adds them to the loss that it returns if"
            " there are labels (trainers that compute the loss from hidden states or logits skip them)"
        )


class Objective:
    """Mixin with the losses of a model that has ``model``, ``lm_head``, and ``mtp`` or None."""

    config: HybridConfig
    training: bool
    has_experts: bool
    # Any, as transformers resolves these annotations before the classes are defined
    model: Any
    lm_head: Any
    mtp: Any
    loss_function: Any

    def install_recorders(self) -> None:
        """Install the hooks that record routers now, as compiled stacks cannot install them."""
        stacks = [stack for stack in self.stacks() if balance.routers(stack)]
        self.has_experts = bool(stacks)
        for stack in stacks:
            maybe_install_capturing_hooks(stack)

    def stacks(self) -> list[Any]:
        """Return the main stack and those of the multi-token prediction modules."""
        depths: Any = () if self.mtp is None else self.mtp.depths
        return [self.model, *(depth.stack for depth in depths)]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states (B, T, D) to logits (B, T, V), with the config's scale and soft cap."""
        config = self.config
        return transform_logits(self.lm_head(hidden), config.logit_scale, config.logit_softcap)

    @property
    def has_loss_of_its_own(self) -> bool:
        """Whether ``model.loss_function`` was set; such a function takes logits."""
        return "_loss_function" in vars(self)

    def record(self) -> dict[str, bool]:
        """Return the recording arguments of stacks: router logits in training with experts."""
        if not (self.has_experts and self.training and torch.is_grad_enabled()):
            return {}
        return {"output_router_logits": True}

    def add_losses(
        self,
        result: HybridOutput,
        outputs: Any,
        labels: torch.Tensor | None,
        embeddings: torch.Tensor | None,
        inputs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Set ``loss``, and in training ``mtp_loss`` and ``aux_loss``, on ``result``.

        Args:
            result: output of the model, with logits or None.
            outputs: outputs of the main stack.
            labels: (B, T), or None.
            embeddings: (B, T, D), input of the main stack, for ``mtp``.
            inputs: ``attention_mask`` and ``position_ids`` of the main stack.
            kwargs: arguments of the loss: ``num_items_in_batch``, ``shift_labels``,
                ``label_smoothing``.
        """
        record, passed = self.record(), [outputs]
        items = kwargs.get("num_items_in_batch")
        smoothing = kwargs.pop("label_smoothing", 0.0)
        if not 0 <= smoothing < 1 or (smoothing and labels is None):
            raise ValueError(
                f"label_smoothing: expected a number of at least 0 and below 1, and labels with it, got"
                f" {smoothing} with{'out' if labels is None else ''} labels; try 0"
            )
        if not self.has_loss_of_its_own:
            batch, time = outputs.last_hidden_state.shape[:2]
            check_labels(labels, kwargs.get("shift_labels"), batch, time)
            check_count("num_items_in_batch", items)
        targets = None
        if labels is not None:
            targets = next_tokens(labels, kwargs.get("shift_labels")).long()
            result.loss = self._main_loss(result, outputs, labels, targets, smoothing, kwargs)
            if self.mtp is not None and self.training:
                ahead = self.mtp.loss(
                    outputs.last_hidden_state,
                    embeddings,
                    targets,
                    lambda h, t: self._score(h, t, smoothing) / _count(targets, items, h.device),
                    **inputs,
                    **record,
                )
                result.mtp_loss = ahead.loss
                result.loss = result.loss + self.config.mtp_loss_weight * ahead.loss
                passed += ahead.outputs
        if record:
            result.aux_loss = self._observe(passed, inputs["attention_mask"])
        if targets is not None and result.aux_loss is not None:
            share = balance.share_of_batch(targets, items)
            result.loss = result.loss + share * result.aux_loss.to(result.loss.device)

    def _main_loss(
        self,
        result: HybridOutput,
        outputs: Any,
        labels: torch.Tensor,
        targets: torch.Tensor,
        smoothing: float,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        if self.has_loss_of_its_own:
            if smoothing:
                raise ValueError(
                    "label_smoothing: expected 0 with a custom model.loss_function, got"
                    f" {smoothing}; try smoothing in that function"
                )
            size = self.config.vocab_size
            return self.loss_function(
                logits=result.logits, labels=labels, vocab_size=size, **kwargs
            )
        z_loss = self.config.z_loss if self.training else 0.0
        try:
            if result.logits is None:
                total = self._score(outputs.last_hidden_state, targets, smoothing)
            else:
                total = of_logits(result.logits, targets, z_loss=z_loss, label_smoothing=smoothing)
        except (IndexError, RuntimeError) as error:
            explain_index(error, "labels", targets, self.config.vocab_size, ignored=IGNORED)
            raise
        return total / _count(targets, kwargs.get("num_items_in_batch"), total.device)

    def _score(self, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Compute the summed loss of hidden states with the config's ``loss_backend``."""
        config = self.config
        return cross_entropy(
            hidden,
            self.lm_head,
            targets,
            z_loss=config.z_loss if self.training else 0.0,
            label_smoothing=smoothing,
            multiplier=config.logit_scale,
            cap=config.logit_softcap,
            backend=config.loss_backend,
        )

    def _observe(self, passed: list[Any], attention_mask: Any) -> torch.Tensor:
        """Count the load of the experts, and return the summed balance losses of all layers."""
        total = passed[0].last_hidden_state.new_zeros((), dtype=torch.float32)
        for stack, outputs in zip(self.stacks(), passed, strict=False):
            if not balance.routers(stack):
                continue
            hidden = outputs.last_hidden_state
            mask = hidden.new_ones(hidden.shape[:2])
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                mask = attention_mask[:, -hidden.shape[1] :]
            logits = outputs.router_logits
            # not the indices that routers return: with expert parallelism they may be of one process
            pairs = zip(balance.routers(stack).values(), logits, strict=True)
            indices = [router.choices(x) for router, x in pairs]
            total = total + balance.observe(stack, logits, indices, mask).to(total.device)
        return total


def _count(
    targets: torch.Tensor, items: torch.Tensor | int | None, device: torch.device
) -> torch.Tensor | int:
    """Return the divisor of the summed loss: the targets of the whole step if known, else of the batch.

    It is at least 1, so that the loss of a batch without targets is 0 and not NaN.
    """
    if items is None:
        items = (targets != IGNORED).sum()
    return items.to(device).clamp(min=1) if isinstance(items, torch.Tensor) else max(items, 1)
