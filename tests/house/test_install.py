"""Every way to install and import: wheel, editable, repository root, elsewhere, beside PyPI's `kernels`, without Triton."""

import dataclasses
import email
import os
import subprocess
import sys
import tarfile
import typing
import zipfile
from pathlib import Path
from unittest import mock

import pytest

import qwen_fast
from qwen_fast import versions
from qwen_fast.common import options

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


def sources() -> list[str]:
    """Files of the repository, or of the sdist that lies here instead."""
    if not (ROOT / ".git").exists():
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        made = ("__pycache__", ".egg-info", ".venv", ".pytest_cache", "PKG-INFO", "setup.cfg", "build")
        return [str(path) for path in found if not any(part in str(path) for part in made)]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources: a build leaves its traces there and not in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in sources():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
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
    assert {"qwen_fast/py.typed", "qwen_fast_kernels/py.typed"} <= set(names)
    listed = (ROOT / "qwen_fast" / "demo" / "checkpoint" / "SHA256SUMS").read_text().splitlines()
    assert {f"qwen_fast/demo/checkpoint/{line.split('  ')[1]}" for line in listed} <= set(names)


def test_the_wheel_says_who_it_is(wheel):
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    about = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    assert {"lora", "plot", "bench", "serve", "slow", "test"} == set(about.get_all("Provides-Extra"))
    assert "Typing :: Typed" in about.get_all("Classifier")
    needed = {line for line in about.get_all("Requires-Dist") if "extra ==" not in line}
    assert not [line for line in needed if "<" in line], "a cap makes pip downgrade newer environments"
    assert "](docs/" not in about.get_payload(), "a link that leads nowhere on an index page"


def test_links_of_the_index_page():
    namespace: dict = {"__name__": "setup", "__file__": str(ROOT / "setup.py")}
    with mock.patch("setuptools.setup"):
        exec((ROOT / "setup.py").read_text(encoding="utf-8"), namespace)
    page, text = namespace["index_page"], "![a b](p/q.png) [docs](docs/x.md#y), [out](https://z)"
    absolute = "![a b](https://h/raw/main/p/q.png) [docs](https://h/blob/main/docs/x.md#y), [out](https://z)"
    assert page(text, "https://h") == absolute
    assert page(text, "") == " docs, [out](https://z)"


@pytest.mark.slow
def test_the_sdist_holds_the_sources_and_passes_tests(source, tmp_path):
    """Every file that the repository has; and the tests of a room pass where it was unpacked."""
    build = "from setuptools.build_meta import build_sdist; import sys; print(build_sdist(sys.argv[1]))"
    python(build, source, arguments=(str(tmp_path),))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (root,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not [name for name in sources() if not (root / name).is_file()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/schedule"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


USER = """
import qwen_fast
from qwen_fast import Picture, Report, Schedule, Warmup

pipe = qwen_fast.QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", device="cuda", modulation="host")
same = qwen_fast.enable(pipe, modulation="auto", cuda_graph=False, vae_memory=1 << 30, prompt_cache=None, strict=True)
found: Report = qwen_fast.report(same)
calls: dict[str, int] = found.calls
pictures: list[Picture] = list(qwen_fast.generate(pipe, ["a cat"], seed=1, num_inference_steps=4))
took: list[Warmup] = qwen_fast.warmup(pipe, [(64, 64)], steps=2)
seconds: float = took[0].first + pictures[0].seconds["denoise"]
mu: float | None = Schedule.from_config({}, 4, image_seq_len=16).mu
"""
MYPY = """
[mypy]
strict = True
follow_imports = silent
""" + "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "diffusers", "transformers", "triton", "numpy"))


def test_a_users_file_passes_a_strict_type_check(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "mypy.ini").write_text(MYPY)

    def check(text: str) -> str:
        (tmp_path / "user.py").write_text(text)
        environment = {**os.environ, "MYPYPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    assert "Success" in check(USER)
    said = check(USER + 'qwen_fast.enable(pipe, modulation="nowhere")\nqwen_fast.enable(pipe, modulations="host")\n')
    assert "Literal['auto', 'device', 'host', 'layers']" in said and 'did you mean "modulation"' in said


def test_the_types_of_options_are_told_twice_alike():
    fields = {field.name: field.type for field in dataclasses.fields(options.Options)}
    assert fields == typing.get_type_hints(options.OptionsGiven)
    assert set(options.VALUES) == set(fields) - {"vae_memory", "prompt_cache"}
    hints = typing.get_type_hints(qwen_fast.enable)
    assert hints.keys() - {"pipe", "return"} == fields.keys() and hints["cuda_graph"] == str | bool


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


EVERY_MODULE = """
import importlib, sys, zipfile
site, wheel = sys.argv[1:]
files = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
for name in (file[:-3].replace("/", ".").removesuffix(".__init__") for file in files):
    if not name.endswith(".__main__"):  # that would run it
        assert importlib.import_module(name).__file__.startswith(site), name
print(len(files))
"""


def test_the_wheel_and_every_module_of_it_import_from_elsewhere(wheel, tmp_path):
    """Also those of the benchmarks, under the name that they are installed as: nothing is left out of the wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "cwd").mkdir()
    sources = [path for folder in ("qwen_fast", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    arguments = str(tmp_path / "site"), str(wheel)
    printed = python(IMPORT + EVERY_MODULE, tmp_path / "cwd", tmp_path / "site", arguments=arguments).split()
    assert printed == [str(tmp_path / "site" / "qwen_fast" / "__init__.py"), str(len(sources))]


@pytest.mark.slow
def test_the_repository_imports_from_its_root_and_from_elsewhere(tmp_path):
    for cwd in (ROOT, tmp_path):
        assert python(IMPORT, cwd, ROOT, ROOT / "kernels") == str(ROOT / "qwen_fast" / "__init__.py")


@pytest.mark.slow
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
