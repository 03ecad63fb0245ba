from . import ablate as ablate
from . import config as config
from . import convert as convert
from . import data as data
from . import distill as distill
from . import ffn as ffn
from . import hub as hub
from . import layout as layout
from . import mixers as mixers
from . import modeling as modeling
from . import nn as nn
from . import plan as plan
from . import registry as registry
from . import serve as serve
from . import train as train
from .config.hybrid_config import HybridConfig as HybridConfig
from .config.options import ConfigError as ConfigError
from .config.registry import register_feed_forward as register_feed_forward
from .config.registry import register_mixer as register_mixer
from .layout import LayoutError as LayoutError
from .mixers.base import Mixer as Mixer
from .mixers.base import MixerOptions as MixerOptions
from .mixers.linear_mixer import LinearMixer as LinearMixer
from .modeling.classification import (
    HybridForSequenceClassification as HybridForSequenceClassification,
)
from .modeling.classification import HybridForTokenClassification as HybridForTokenClassification
from .modeling.model import HybridForCausalLM as HybridForCausalLM
from .modeling.stack import HybridModel as HybridModel

__version__: str
