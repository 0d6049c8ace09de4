"""settings.ini, constraints.txt, environment.yml and the Makefile ask for the same things, in a form that conda and pip can read."""
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
ENV = yaml.safe_load((ROOT / "environment.yml").read_text())
PIP = next(d["pip"] for d in ENV["dependencies"] if isinstance(d, dict))
CONDA = [d for d in ENV["dependencies"] if isinstance(d, str)]
CONDA_NAMES = {"torch": "pytorch"}  # name on the Python index -> name on conda-forge
MATCH = re.compile(r"^([a-z0-9][a-z0-9._-]*)\s*(.*)$")
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT / "settings.ini")
CFG = CFG["DEFAULT"]
PYTHONS = "3.10.12", "3.11.2", "3.12.3", "3.13.5"


def wanted(key):
    return [Requirement(r) for r in CFG[key].split()]


def asked():
    """Name -> version specifier, of the conda environment."""
    conda = dict(MATCH.match(spec).groups() for spec in CONDA)
    pip = {r.name: str(r.specifier) for r in map(Requirement, (s for s in PIP if s != "-e ."))}
    assert not set(conda) & set(pip)
    return conda | pip


def pins(python):
    """Name -> the version that constraints.txt names for this Python on Linux."""
    env = {"python_version": ".".join(python.split(".")[:2]), "python_full_version": python, "sys_platform": "linux"}
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            r = Requirement(line)
            if r.marker is None or r.marker.evaluate(env):
                (exact,) = r.specifier
                assert exact.operator == "==" and r.name not in found, line
                found[r.name] = Version(exact.version)
    return found


def test_conda_environment_parses():
    assert set(ENV) <= {"name", "channels", "dependencies", "variables"}
    assert ENV["name"] == "jointgen" and "conda-forge" in ENV["channels"] and "-e ." in PIP
    for spec in CONDA:
        version = MATCH.match(spec).group(2)
        SpecifierSet(re.sub(r"^=(?!=)", "==", version))


def test_conda_environment_agrees_with_settings():
    have = asked()
    for r in wanted("requirements") + wanted("dev_requirements"):
        ours = have.pop(CONDA_NAMES.get(r.name, r.name))
        assert SpecifierSet(ours) == r.specifier, f"{r} in settings.ini, {ours} in environment.yml"
    assert set(have) == {"python", "pip"}, f"settings.ini does not ask for {set(have)}"


def test_python_versions_agree():
    version = have = asked()["python"].lstrip("=")
    assert Version(version) >= Version(CFG["min_python"]), have
    assert "sys.version_info < (3, 10)" in (ROOT / "Makefile").read_text() and CFG["min_python"] == "3.10"


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_fit_the_requirements(python):
    have = pins(python)
    for key in "requirements", "dev_requirements", "kernels_requirements", "metrics_requirements", "hub_requirements", "browser_requirements":
        for r in wanted(key):
            assert r.name in have, f"constraints.txt names no version of {r.name}"
            assert r.specifier.contains(have[r.name], prereleases=True), f"{r} against {have[r.name]}"


def test_runtime_requirements_have_floors_and_are_few():
    assert len(wanted("requirements")) <= 14
    for r in wanted("requirements"):
        operators = {s.operator for s in r.specifier}
        assert ">=" in operators and "==" not in operators, r


@pytest.mark.parametrize("verb", ["demo", "test", "install", "lab", "export", "readme", "notebooks", "weights"])
def test_make_knows_the_verb(verb, tmp_path):
    planned = subprocess.run(["make", "-n", verb, f"VENV={tmp_path / 'env'}"], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert "constraints.txt" in planned.stdout  # a missing environment would be set up
    assert f"make {verb}" in subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout


def test_make_installs_once(tmp_path):
    env = tmp_path / "env"
    (env / "bin").mkdir(parents=True)
    (env / ".installed").touch()
    planned = subprocess.run(["make", "-n", "demo", f"VENV={env}"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "pip install" not in planned and "jointgen.cli demo" in planned


@pytest.mark.parametrize("script, said", [
    ("exit 127", "does not run"),
    ('case "$2" in *version_info*) exit 1;; --version) ;; esac; echo "Python 3.8.1"', "too old"),
    ('case "$2" in *ensurepip*) exit 1;; esac', "python3-venv")])
def test_make_says_what_python_lacks(script, said, tmp_path):
    python = tmp_path / "python3.x"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    run = subprocess.run(["make", "install", f"VENV={tmp_path / 'env'}", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and said in run.stdout and not (tmp_path / "env").exists(), run.stdout + run.stderr
