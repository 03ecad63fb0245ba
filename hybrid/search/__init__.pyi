from .config import SearchFile as SearchFile
from .config import load_config as load_config
from .config import parse_config as parse_config
from .frontier import on_frontier as on_frontier
from .runner import search as search
