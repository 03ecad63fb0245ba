"""Distillation: a published model as the teacher, the same model under another layout as the
student.

hybrid distill CONFIG [key=value ...]

load_config   a YAML file and overrides -> DistillConfig; reports all mistakes
distill       DistillConfig -> Report; the same call resumes
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
