"""Saving notebooks and writing the README."""
import base64
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from jointgen.dev import WIDGET, quiet, readme_files, refresh, skip_reason, strip_outputs, write_readme

ROOT = Path(__file__).parents[1]
DOT = base64.b64encode(b"\x89PNG a picture").decode()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small project: cleaning reads settings.ini."""
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "nbs"


def write(path, *cells, **metadata):
    nbformat.write(new_notebook(cells=list(cells), metadata=metadata), path)
    return path


@pytest.mark.parametrize("source, reason", [
    ("x = 1", ""), ("#| eval: false\nx", "eval: false"), ("#|eval:false", "eval: false"), ("#| export\n#| eval: false\nx", "eval: false"),
    ("x  # eval: false", ""), ("'''\ntext'''", "")])
def test_skip_reason(source, reason):
    assert skip_reason(source) == reason


def test_flags_depend_on_the_machine(monkeypatch):
    monkeypatch.delenv("JOINTGEN_SLOW", raising=False)
    assert skip_reason("#| slow") == "slow"
    monkeypatch.setenv("JOINTGEN_SLOW", "1")
    assert skip_reason("#| slow") == ""
    monkeypatch.setenv("PATH", "")
    assert skip_reason("#| cuda") == "needs a GPU"


def test_quiet_respects_what_is_set():
    env = {"OMP_NUM_THREADS": "7"}
    assert quiet(env)["OMP_NUM_THREADS"] == "7" and env["IN_TEST"] == "1"


def test_refresh_twice_gives_the_same_bytes(folder):
    path = write(folder / "a.ipynb", new_markdown_cell("# A"), new_code_cell("import sys, os\nprint('x', file=sys.stderr); os.environ['IN_TEST']"),
                 new_code_cell("object()"))
    assert refresh(path) == 2
    first = path.read_bytes()
    refresh(path)
    assert path.read_bytes() == first and b"0x" not in first
    outputs = [c.outputs for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    assert [len(o) for o in outputs] == [1, 1] and outputs[0][0].data["text/plain"] == "'1'"


def test_refresh_keeps_outputs_of_skipped_cells_and_tags(folder):
    old = new_output("execute_result", {"text/plain": "kept"}, execution_count=3)
    path = write(folder / "a.ipynb", new_code_cell("#| eval: false\n1/0", outputs=[old], metadata={"tags": ["mine"]}), new_code_cell("1"))
    assert refresh(path) == 1
    cell = nbformat.read(path, 4).cells[0]
    assert cell.outputs[0].data["text/plain"] == "kept" and cell.metadata.tags == ["mine"]


def test_a_failing_notebook_is_left_alone(folder):
    path = write(folder / "a.ipynb", new_code_cell("1"), new_code_cell("1/0"))
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        refresh(path)
    assert path.read_bytes() == before
    expected = write(folder / "b.ipynb", new_code_cell("1/0", metadata={"tags": ["raises-exception"]}))
    assert refresh(expected) == 1


def test_widgets_leave_nothing_behind(folder):
    path = write(folder / "a.ipynb", new_code_cell("import ipywidgets\nipywidgets.IntSlider()"))
    refresh(path)
    saved = nbformat.read(path, 4)
    assert "widgets" not in saved.metadata and WIDGET not in path.read_text()


def test_strip_outputs_keeps_the_rest():
    text = new_output("display_data", {"text/plain": "x"})
    nb = new_notebook(cells=[new_code_cell("", outputs=[text, new_output("display_data", {WIDGET: {}, "text/plain": "Box()"})]), new_markdown_cell("hi")])
    strip_outputs(nb)
    assert nb.cells[0].outputs == [text]


def test_readme_has_pictures_and_working_links(folder):
    picture = new_output("display_data", {"image/png": DOT, "text/plain": "<Figure>"})
    write(folder / "index.ipynb", new_markdown_cell("# Title\n\n[pairs](00_pairs.ipynb) ![x](images/x.png)"), new_code_cell("#| echo: false\nshow()", outputs=[picture]),
          new_code_cell("secret", metadata={"tags": ["no-readme"]}))
    files = readme_files(folder / "index.ipynb")
    text = files["README.md"].decode()
    (picture_path,) = [p for p in files if p != "README.md"]
    assert f"]({picture_path})" in text and files[picture_path] == b"\x89PNG a picture" and picture_path.startswith("nbs/images/")
    assert "(nbs/00_pairs.ipynb)" in text and "(nbs/images/x.png)" in text and "```python\nshow()" in text
    assert "secret" not in text and "#|" not in text
    (folder / "images").mkdir()
    (folder / "images" / "readme_9_9.png").write_bytes(b"old")
    assert write_readme(folder.parent) == list(files)
    assert not (folder / "images" / "readme_9_9.png").exists() and (folder.parent / picture_path).exists()


def test_the_commands(folder):
    path = write(folder / "a.ipynb", new_code_cell("6*7"))
    run = lambda *a: subprocess.run([sys.executable, "-m", "jointgen.dev", *a], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # noqa: E731
    good = run("refresh", str(path))
    assert good.returncode == 0 and "1 cells run" in good.stdout, good.stderr
    assert run("refresh", "nowhere.ipynb").returncode == 2 and run("refresh").returncode == 2
