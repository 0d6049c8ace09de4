__version__ = "0.1.0"

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec

from . import models  # light: a callable package whose members come when they are asked for


def load(name, device='cpu'):
    "Return the model called `name` with its shipped weights and vocabulary, ready to sample."
    from .joint import load as load_shipped
    return load_shipped(name, device=device)


def __getattr__(name):
    "Import `jointgen.<name>` when it is first used, so that `import jointgen` stays light."
    if name.startswith('_') or _find_spec(f'{__name__}.{name}') is None:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return _import_module(f'.{name}', __name__)
