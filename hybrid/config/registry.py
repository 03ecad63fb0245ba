"""The registry: what a letter of a layout stands for.

A mixer (or a feed-forward) is one class in one file, registered by a decorator with its symbol. Ours
are declared by name and symbol in `hybrid.mixers` and `hybrid.ffn`, and imported when they are used. The
rest of the package asks the registry and holds no list of its own, so a user's mixer in a user's file
is on the same footing as ours: import the file (in commands `--import FILE`, `hybrid.imports`; or name
it in the entry-point group `hybrid.mixers`) and its name works in every layout.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from hybrid.config.options import did_you_mean

C = TypeVar("C", bound=type)


class Registry(Generic[C]):
    """Classes by name and by symbol; duplicates are refused, misses name the nearest right name.

    Args:
        kind: what the classes are, for messages.
        home: the package that declares ours.
        entry_point_group: where other packages list theirs.
    """

    def __init__(self, kind: str, home: str, entry_point_group: str) -> None:
        self.kind = kind
        self.home = home
        self.entry_point_group = entry_point_group
        self._declared: dict[str, tuple[str | None, str]] = {}
        self._by_name: dict[str, C] = {}
        self._by_symbol: dict[str, str] = {}
        self._plugins_loaded = False

    def declare(self, package: str, classes: Mapping[str, tuple[str | None, str]]) -> None:
        """Make classes known without importing them.

        Args:
            package: that holds their modules.
            classes: name -> (symbol, class). The module has the name, or stands before the class:
                `module:Class`.
        """
        for name, (symbol, target) in classes.items():
            path = target if ":" in target else f"{name}:{target}"
            self._declared[name] = symbol, f"{package}.{path}"

    def register(self, name: str, symbol: str | None = None) -> Callable[[C], C]:
        """Class decorator. `symbol` is the letter a layout uses by default; None leaves it to configs.

        Raises:
            ValueError: the name or the symbol is taken by another class.
        """

        def add(cls: C) -> C:
            importlib.import_module(self.home)
            taken = self._origin(name)
            if taken not in (None, _origin(cls)):
                raise ValueError(
                    f"{self.kind} {name!r} is registered already, by {taken}; choose another name"
                )
            owner = self._symbols().get(symbol) if symbol else None
            if owner not in (None, name):
                raise ValueError(
                    f"symbol {symbol!r} stands for the {self.kind} {owner!r} already; register"
                    f" {name!r} without a symbol and bind a letter to it in the config"
                )
            cls.name, cls.symbol = name, symbol
            cls.kind = getattr(cls, "kind", name)
            self._by_name[name] = cls
            if symbol:
                self._by_symbol[symbol] = name
            return cls

        return add

    def get(self, name: str) -> C:
        """The class called `name`. Raises ValueError with the nearest right name."""
        if name not in self.names():
            near = did_you_mean(name, self.names())
            stop = "" if near.endswith("?") else "."
            raise ValueError(
                f"unknown {self.kind} {name!r}, {near}{stop} A {self.kind} of your own registers when"
                f" its file is imported: import it first (commands: `--import FILE`), or list it under"
                f" the entry-point group {self.entry_point_group!r}."
            )
        if name not in self._by_name:
            self._by_name[name] = pkgutil.resolve_name(self._declared[name][1])
        return self._by_name[name]

    def symbols(self) -> dict[str, str]:
        """Symbol -> name, for every class that has a symbol."""
        self._load_plugins()
        return self._symbols()

    def names(self) -> list[str]:
        """All names: ours, then those of others in the order of registration."""
        self._load_plugins()
        return list(self._declared | self._by_name)

    def classes(self) -> list[C]:
        """All classes, in the order of `names`."""
        return [self.get(name) for name in self.names()]

    def _symbols(self) -> dict[str, str]:
        declared = {symbol: name for name, (symbol, _) in self._declared.items() if symbol}
        return declared | self._by_symbol

    def _origin(self, name: str) -> str | None:
        """The module and the name of the class that has a name already."""
        if name in self._by_name:
            return _origin(self._by_name[name])
        return self._declared[name][1].replace(":", ".") if name in self._declared else None

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        importlib.import_module(self.home)
        for point in entry_points(group=self.entry_point_group):
            point.load()


def _origin(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def load_model_classes() -> None:
    """Import the model classes, which registers them with transformers' Auto classes.

    An Auto class looks a model up by the class of a config, so a config that is made does this.
    """
    importlib.import_module("hybrid.modeling.auto")


mixers: Registry[Any] = Registry("mixer", "hybrid.mixers", "hybrid.mixers")
feed_forwards: Registry[Any] = Registry("feed-forward", "hybrid.ffn", "hybrid.feed_forwards")

register_mixer = mixers.register
register_feed_forward = feed_forwards.register
