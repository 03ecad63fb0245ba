"""Registries of mixers and feed-forwards, by name and by layout symbol.

A mixer (or a feed-forward) is one class in one file, registered by a decorator with its symbol.
Those of this package are declared by name and symbol in ``hybrid.mixers`` and ``hybrid.ffn``, and
imported on first use. The rest of the package only uses the registry, so that a mixer in a user's
file works like a built-in one: import the file (``--import FILE`` in commands, see
``hybrid.imports``), or list it in the entry-point group ``hybrid.mixers``; then its name works in
every layout.
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
    """Classes by name and by symbol. Duplicates are refused; an unknown name raises an error with
    the nearest known name.

    Args:
        kind: noun for the classes in messages.
        home: package that declares the built-in classes.
        entry_point_group: entry-point group in which other packages list classes.
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
        """Declare classes without importing them.

        Args:
            package: package of their modules.
            classes: name -> (symbol, class). The module is called like the name, unless the class
                is given as ``module:Class``.
        """
        for name, (symbol, target) in classes.items():
            path = target if ":" in target else f"{name}:{target}"
            self._declared[name] = symbol, f"{package}.{path}"

    def register(self, name: str, symbol: str | None = None) -> Callable[[C], C]:
        """Return a class decorator that registers a class.

        Args:
            name: value of ``type`` in a config.
            symbol: default letter in layouts; None to let configs bind one.

        Raises:
            ValueError: the name or the symbol belongs to another class.
        """

        def add(cls: C) -> C:
            importlib.import_module(self.home)
            taken = self._origin(name)
            if taken not in (None, _origin(cls)):
                raise ValueError(
                    f"{self.kind}: expected a new name, got {name!r} of {taken}; try another name"
                )
            owner = self._symbols().get(symbol) if symbol else None
            if owner not in (None, name):
                raise ValueError(
                    f"symbol: expected a free letter, got {symbol!r} of the {self.kind} {owner!r};"
                    f" try to register {name!r} without a symbol and bind a letter in the config"
                )
            cls.name, cls.symbol = name, symbol
            cls.kind = getattr(cls, "kind", name)
            self._by_name[name] = cls
            if symbol:
                self._by_symbol[symbol] = name
            return cls

        return add

    def get(self, name: str) -> C:
        """Return the class called ``name``.

        Raises:
            ValueError: no class has the name; the message has the nearest one.
        """
        if name not in self.names():
            near = did_you_mean(name, self.names())
            stop = "" if near.endswith("?") else "."
            raise ValueError(
                f"unknown {self.kind} {name!r}, {near}{stop} A custom {self.kind} is registered"
                f" when its file is imported: import it first (commands: `--import FILE`), or list"
                f" it in the entry-point group {self.entry_point_group!r}."
            )
        if name not in self._by_name:
            self._by_name[name] = pkgutil.resolve_name(self._declared[name][1])
        return self._by_name[name]

    def symbols(self) -> dict[str, str]:
        """Return symbol -> name of every class with a symbol."""
        self._load_plugins()
        return self._symbols()

    def names(self) -> list[str]:
        """Return all names: built-in ones, then others in order of registration."""
        self._load_plugins()
        return list(self._declared | self._by_name)

    def classes(self) -> list[C]:
        """Return all classes, in the order of ``names``."""
        return [self.get(name) for name in self.names()]

    def _symbols(self) -> dict[str, str]:
        declared = {symbol: name for name, (symbol, _) in self._declared.items() if symbol}
        return declared | self._by_symbol

    def _origin(self, name: str) -> str | None:
        """Return module and name of the class registered under a name."""
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

    An Auto class looks up a model by the class of its config, so creating a config calls this.
    """
    importlib.import_module("hybrid.modeling.auto")


mixers: Registry[Any] = Registry("mixer", "hybrid.mixers", "hybrid.mixers")
feed_forwards: Registry[Any] = Registry("feed-forward", "hybrid.ffn", "hybrid.feed_forwards")

register_mixer = mixers.register
register_feed_forward = feed_forwards.register
