"""Training: a YAML in, a Hugging Face checkpoint out, on transformers' ``Trainer``.

accelerate launch -m hybrid.train CONFIG [key=value ...]

load_config   a YAML file and overrides -> TrainConfig; reports all mistakes
run           TrainConfig -> RunResult; the same call resumes
"""

import lazy_loader

# ``import hybrid.train`` must not import transformers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
