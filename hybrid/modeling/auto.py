"""Registration of the model classes in transformers' Auto classes, on import of this module."""

from __future__ import annotations

from transformers.models.auto import modeling_auto as auto

from hybrid.config.hybrid_config import HybridConfig
from hybrid.modeling.classification import (
    HybridForSequenceClassification,
    HybridForTokenClassification,
)
from hybrid.modeling.model import HybridForCausalLM
from hybrid.modeling.stack import HybridModel

# Also fill the tables of class names: transformers' Trainer shifts labels for label smoothing only for
# classes in these tables.
for auto_class, names, model in (
    (auto.AutoModel, auto.MODEL_MAPPING_NAMES, HybridModel),
    (auto.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, HybridForCausalLM),
    (
        auto.AutoModelForSequenceClassification,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        HybridForSequenceClassification,
    ),
    (
        auto.AutoModelForTokenClassification,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        HybridForTokenClassification,
    ),
):
    auto_class.register(HybridConfig, model, exist_ok=True)
    names[HybridConfig.model_type] = model.__name__
