from .config import MuonConfig as MuonConfig
from .config import TrainConfig as TrainConfig
from .config import load_config as load_config
from .config import parse_config as parse_config
from .runner import RunResult as RunResult
from .runner import run as run
