"""A library that is loaded when something of it is used, not when it is imported.

    import torch   (by transformers, which only asks whether it is there) -> a module, empty so far
    torch.Tensor                                                          -> loaded

transformers imports PyTorch wherever it is installed: two seconds and 180 MiB of each command, of
which tokenizers use nothing.
"""

import sys
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any


class _Lazy(ModuleType):
    """A module without contents; the first attribute that it lacks loads it.

    Before that it has what import made: name, spec, loader and file, by which `inspect` searches
    all modules. It lacks `__path__`, so that importing a submodule loads it first. Another thread
    waits until all of it is there.
    """

    def __getattr__(self, name: str) -> Any:
        with _LOADING:
            if type(self) is _Lazy:
                own = vars(self)["__spec__"].name
                if own not in _FOLDERS:  # asked by itself, while it is loaded
                    raise AttributeError(f"module {own!r} has no attribute {name!r}")
                _load(self, own)
        return getattr(self, name)


_LOADING = RLock()
_FOLDERS: dict[str, list[str]] = {}
"""`__path__` of the modules that are not loaded yet."""


def load_when_used(name: str) -> None:
    """Make `import NAME` of a package free until it is used; no effect where it is not installed.

    Nor has it one on a package that has been imported.
    """
    spec = None if name in sys.modules else find_spec(name)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return
    module = module_from_spec(spec)
    module.__class__ = _Lazy
    _FOLDERS[name] = vars(module).pop("__path__")
    sys.modules[name] = module


def _load(module: ModuleType, name: str) -> None:
    module.__path__ = _FOLDERS.pop(name)
    try:
        vars(module)["__loader__"].exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)  # as import does
        raise
    module.__class__ = ModuleType
