"""Runs the package under jaxtyping's import hook: a shape annotation that is not true fails a test."""
from jointgen.dev import quiet

quiet()  # before torch starts its threads

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("jointgen", "beartype.beartype")
