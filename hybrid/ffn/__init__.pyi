from . import balance as balance
from . import dense as dense
from . import moe as moe
from .base import FeedForward as FeedForward
from .base import FeedForwardOptions as FeedForwardOptions
