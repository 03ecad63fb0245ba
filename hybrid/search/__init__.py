"""Search for the layout: which softmax layers of a model should stay under a budget.

    hybrid search CONFIG [key=value ...]

load_config   a YAML file and overrides -> SearchFile; reports all mistakes
search        SearchFile -> report: layouts on the frontier; the same call resumes
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
