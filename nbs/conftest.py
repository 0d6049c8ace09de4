"""Makes `pytest --nbval` and `nbdev_clean` agree, and honours nbdev's own flags. Imports nothing heavy."""
from importlib.util import find_spec
from pathlib import Path

import pytest

from jointgen.dev import quiet, skip_reason

collect_ignore_glob = ["_*.ipynb", "*/_*.ipynb"]  # nbdev skips these too
if not find_spec("triton"):  # it exists for Linux only: pages that show kernels are left out elsewhere
    collect_ignore = [p.name for p in Path(__file__).parent.glob("*.ipynb") if "import triton" in p.read_text(encoding="utf-8")]
quiet()  # inherited by the kernels: the same environment as when the notebooks were saved


def pytest_configure(config):
    if not getattr(config.option, "nbval_sanitize_with", None):
        config.option.nbval_sanitize_with = str(Path(__file__).parent / "sanitize.cfg")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if type(item).__name__ != "IPyNbCell":
            continue
        item.parent.skip_compare = tuple({*item.parent.skip_compare, "stderr"})  # never stored, so never compared
        if skip_reason(item.cell.source):
            item.options["skip"] = True
        if item.cell.execution_count is None:  # nbdev_clean removed it; nbval would call the cell unrun
            item.cell.execution_count = item.cell_num + 1
