"""Make compressed directories known to transformers without importing it.

transformers has a registry of quantization methods, but it and torch take seconds to import, and
`import cerwu_gpu` must not. So where transformers is loaded already, the method is registered at
once, and otherwise right after transformers has loaded its registry.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
QUANTIZER = "cerwu_gpu.serving.quantizer"
"""Module that registers the method when it is imported."""


def register() -> None:
    """Register the quantization method "cerwu" with transformers, now or when it is imported."""
    if REGISTRY in sys.modules:
        import_module(QUANTIZER)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder(MetaPathFinder):
    """Finder of transformers' registry that works once, with `_RegistryLoader` as the loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegistryLoader(spec.loader)
        return spec


class _RegistryLoader(Loader):
    """Loader that runs the module's own loader and then registers the method."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(QUANTIZER)
