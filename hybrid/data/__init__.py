"""Training data: sources, tokenisation, packing with document boundaries, mixtures.

Row ``i`` of a training run depends only on the configuration and on ``i``. So a resumed run sees
the same rows in the same order.

    open_source   one entry of a config's ``data:`` -> rows
    Mixture       several of them by weight -> one data set
    RowCollator   rows -> a batch with ``position_ids`` that restart at each document
    prepare       text -> tokenised shards on disk, memory-mapped afterwards
"""

import lazy_loader

# Light on purpose: ``import hybrid.data`` loads neither torch nor datasets.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
