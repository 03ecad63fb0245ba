"""Training: a YAML in, a Hugging Face checkpoint out, on transformers' ``Trainer``.

accelerate launch -m hybrid.train CONFIG [key=value ...]

load_config   a YAML file and overrides -> TrainConfig, every mistake named
run           TrainConfig -> RunResult; the same call again goes on where the last one ended
"""

import lazy_loader

# Light on purpose: `import hybrid.train` does not load transformers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
