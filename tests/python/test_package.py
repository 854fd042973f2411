"""The package as users get it: a wheel, and the examples."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import epd
import pytest

CLIENT = pathlib.Path(__file__).parents[2] / "client"


def run(*command: object, **environment: str) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_builds_with_every_module_and_the_type_marker(tmp_path):
    absent = [name for name in ("pip", "setuptools", "wheel") if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"no {', '.join(absent)}")
    source = tmp_path / "source"
    shutil.copytree(CLIENT / "python", source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    run(*pip, "--no-index", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"epd-{epd.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    package = CLIENT / "python" / "epd"
    want = {f"epd/{path.relative_to(package)}" for path in package.rglob("*") if path.suffix in (".py", ".typed")}
    assert want <= names and "epd/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"epd", f"epd-{epd.__version__}.dist-info"}
    # and works from there, with nothing else of the tree
    code = "import epd, sys; assert '.whl' in epd.__file__; print(epd.Role.RECV_X.value)"
    assert run(sys.executable, "-c", code, PYTHONPATH=str(wheel)).strip() == "4"


def test_versions_agree():
    project = (CLIENT / "python" / "pyproject.toml").read_text()
    assert f'version = "{epd.__version__}"' in project


def test_the_minimal_example_runs(socket):
    assert "sum of the layer's output" in run(sys.executable, CLIENT / "python" / "examples" / "minimal.py", EPD_SOCKET=socket)


@pytest.mark.parametrize("ranks", [2, 4])
def test_training_through_epd_has_the_losses_of_plain_numpy(socket, ranks):
    program = CLIENT / "examples" / "train_moe_numpy.py"
    out = run(sys.executable, program, "--ranks", ranks, "--steps", 30, "--group", f"train-{ranks}", EPD_SOCKET=socket)
    last, first = (float(word) for word in out.splitlines()[-1].replace(",", "").split() if word.replace(".", "").isdigit())
    assert last < 0.8 * first
