"The joint models, one module each. Called, `jointgen.models()` lists those whose weights are shipped."
import sys as _sys
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from types import ModuleType as _ModuleType


class _Models(_ModuleType):
    "A package of models that can also be called."

    def __call__(self):
        "Return the names that `jointgen.load` knows."
        from ..joint import shipped
        return shipped()

    def __getattr__(self, name):
        if name.startswith('_') or _find_spec(f'{self.__name__}.{name}') is None:
            raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')
        return _import_module(f'.{name}', self.__name__)


_sys.modules[__name__].__class__ = _Models
