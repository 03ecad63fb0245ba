from .config import DistillConfig as DistillConfig
from .config import load_config as load_config
from .config import parse_config as parse_config
from .runner import distill as distill
