"""Every way to install and import: wheel, editable, repository root, elsewhere, beside PyPI's `kernels`, without Triton."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwen_fast import versions

ROOT = Path(__file__).parents[2]
IMPORT = "import qwen_fast, qwen_fast_kernels; qwen_fast.enable; print(qwen_fast.__file__)"


def python(code: str, cwd: Path, *paths: Path, arguments: tuple[str, ...] = ()) -> str:
    """stdout of `code` in a fresh interpreter; `paths` come first on its path, and nothing of this process's is inherited."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources: a build leaves its traces there and not in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_our_packages_and_no_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        *("qwen_fast", "qwen_fast_kernels", "qwen_fast_benchmarks")
    }
    for module in ("qwen_fast/pipelines/text_to_image.py", "qwen_fast/cli/generate.py", "qwen_fast_kernels/cfg_euler_step.py"):
        assert module in names
    assert "qwen_fast_benchmarks/shared/rows.py" in names
    listed = (ROOT / "qwen_fast" / "demo" / "checkpoint" / "SHA256SUMS").read_text().splitlines()
    assert {f"qwen_fast/demo/checkpoint/{line.split('  ')[1]}" for line in listed} <= set(names)


BENCHMARKS = "from qwen_fast.cli.benchmarks import benchmarks; print(benchmarks('shared.rows').__file__)"


def test_the_benchmarks_are_found_in_a_wheel_and_in_the_repository(wheel, tmp_path):
    """A package `benchmarks` of somebody else's, which is on the path of many projects, is not taken for ours."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "site" / "benchmarks").mkdir()
    (tmp_path / "site" / "benchmarks" / "__init__.py").write_text("raise AssertionError('not ours')")
    (tmp_path / "cwd").mkdir()
    found = python(BENCHMARKS, tmp_path / "cwd", tmp_path / "site")
    assert found == str(tmp_path / "site" / "qwen_fast_benchmarks" / "shared" / "rows.py")
    for cwd in (ROOT, tmp_path / "cwd"):
        assert python(BENCHMARKS, cwd, ROOT, ROOT / "kernels") == str(ROOT / "benchmarks" / "shared" / "rows.py")


def test_the_wheel_imports_from_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "cwd").mkdir()
    assert python(IMPORT, tmp_path / "cwd", tmp_path / "site").startswith(str(tmp_path / "site"))


EVERY_MODULE = """
import importlib, sys, zipfile
site, wheel = sys.argv[1:]
files = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
for name in (file[:-3].replace("/", ".").removesuffix(".__init__") for file in files):
    if not name.endswith(".__main__"):  # that would run it
        assert importlib.import_module(name).__file__.startswith(site), name
print(len(files))
"""


def test_every_module_of_the_wheel_imports(wheel, tmp_path):
    """Also those of the benchmarks, under the name that they are installed as: nothing is left out of the wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "cwd").mkdir()
    sources = [path for folder in ("qwen_fast", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    arguments = str(tmp_path / "site"), str(wheel)
    assert python(EVERY_MODULE, tmp_path / "cwd", tmp_path / "site", arguments=arguments) == str(len(sources))


def test_the_repository_imports_from_its_root_and_from_elsewhere(tmp_path):
    for cwd in (ROOT, tmp_path):
        assert python(IMPORT, cwd, ROOT, ROOT / "kernels") == str(ROOT / "qwen_fast" / "__init__.py")


@pytest.mark.parametrize("command", [["pytest"], ["python", "-m", "pytest"]], ids=" ".join)
def test_both_ways_to_start_pytest(command):
    """From the repository root, with the packages on the path as an installation puts them there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    program = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    done = subprocess.run(
        [*program, "-q", "--collect-only", "tests/ops"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "test_euler_step" in done.stdout, done.stdout + done.stderr


def test_kernels_is_still_the_other_project(tmp_path):
    pytest.importorskip("kernels", reason="PyPI's kernels is not installed")
    for cwd in (ROOT, tmp_path):
        assert "site-packages" in python("import kernels; from kernels import get_kernel; print(kernels.__file__)", cwd)


def test_without_triton_the_cpu_draws(checkpoint, tmp_path):
    code = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
import torch, qwen_fast, qwen_fast_kernels
assert "triton" not in sys.modules and not qwen_fast_kernels.HAS_TRITON
pipe = qwen_fast.QwenImagePipeline.from_pretrained({str(checkpoint)!r})
image = pipe("a cat", height=32, width=32, num_inference_steps=2).images[0]
assert image.size == (32, 32) and not qwen_fast.report(pipe).fallbacks
from qwen_fast.common.hardware import unsupported_reason
assert "Triton is not installed" in unsupported_reason(torch.device("cuda"))
print("drawn")
"""
    assert python(code, tmp_path, ROOT, ROOT / "kernels") == "drawn"


NEWEST = {"torch": "2.13.0+cpu", "diffusers": "0.42.1", "transformers": "5.23.0", "numpy": "2.4.6"}


def test_supported_versions_pass():
    assert versions.problems(NEWEST) == versions.problems(versions.LOWEST) == versions.untested(NEWEST) == []


@pytest.mark.parametrize(
    ("package", "version"), [("torch", "2.7.1"), ("diffusers", "0.37.1"), ("transformers", "4.56.2"), ("numpy", "1.26.4")]
)
def test_an_old_package_is_named_with_the_command_that_helps(package, version):
    (problem,) = versions.problems({**NEWEST, package: version})
    assert f"{package} {version} is too old" in problem and f"pip install -U '{package}>=" in problem
    (problem,) = versions.problems({key: value for key, value in NEWEST.items() if key != package})
    assert f"{package} is not installed" in problem


def test_an_old_package_stops_the_import(monkeypatch):
    monkeypatch.setattr(versions, "installed_versions", lambda: {**NEWEST, "diffusers": "0.36.0"})
    with pytest.raises(ImportError, match="diffusers 0.36.0 is too old, 0.38 or newer"):
        versions.check()


def test_a_package_newer_than_tested_is_warned_of(monkeypatch):
    monkeypatch.setattr(versions, "installed_versions", lambda: {**NEWEST, "diffusers": "0.43.0"})
    with pytest.warns(UserWarning, match="diffusers 0.43.0 is newer"):
        versions.check()
