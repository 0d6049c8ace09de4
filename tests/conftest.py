"""Runs the package under jaxtyping's import hook (a shape annotation that is not true fails a test), and Triton in its interpreter where there is no GPU."""
import os
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the interpreter's numpy and torch would fight over the cores

from jointgen.dev import quiet  # noqa: E402

quiet()  # before torch starts its threads

import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any is imported

HOME = Path(__file__).parents[1] / "jointgen"
MODULES = [".".join(p.relative_to(HOME.parent).with_suffix("").parts) for p in sorted(HOME.rglob("*.py")) if p.name != "__init__.py"]
# a kernel is read as text by Triton and its constants are no Python values: it stays undecorated
install_import_hook([m for m in MODULES if not m.startswith("jointgen.kernels.triton_")], "beartype.beartype")
