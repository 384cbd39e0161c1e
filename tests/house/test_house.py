"""Rules of the house that can be read off the source: who imports whom, the order of an op file, its docstring."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels" / "qwen_fast_kernels"
NOT_OPS = {"proof", "tuning"}
OPS = sorted(path.stem for path in KERNELS.glob("[!_]*.py") if path.stem not in NOT_OPS)
KERNEL_FILES = sorted(KERNELS.rglob("*.py"))
SOURCES = sorted(
    path for folder in ("kernels", "qwen_fast", "benchmarks", "tests", "examples") for path in (ROOT / folder).rglob("*.py")
)
FIELDS = ("Args:", "Returns:", "Raises:", "Error:", "Traffic:", "Source:")
MAX_LINES = 400
# Who may import whom, also inside a function. On top stand demo, cli and the face, which is qwen_fast/__init__.py.
COMMON = {"common"}
PARTS = {"schedule", "text", "vae", "transformer", "loading"}
ROOMS = {
    "qwen_fast": {
        "common": set(),
        **dict.fromkeys(PARTS, COMMON),
        "denoise": COMMON | PARTS,
        "pipelines": COMMON | PARTS | {"denoise", "versions"},
        "testing": {"schedule"},
        "versions": set(),
        "qwen_fast": PARTS | {"pipelines", "versions"},
        "demo": COMMON | PARTS | {"pipelines", "testing", "qwen_fast"},
        "cli": COMMON | PARTS | {"pipelines", "testing", "qwen_fast", "demo", "versions"},
    },
    "benchmarks": {
        "shared": set(),
        "operators": {"shared"},
        "attention": {"shared", "operators"},
        "compiler": {"shared", "operators"},
        "tuning": {"shared", "operators", "compiler"},
        "parts": {"shared", "operators", "attention", "compiler", "ladder"},
        "ladder": {"shared"},
        "quality": {"shared"},
        "profiling": {"shared", "operators"},
        "runbook": {"shared", "operators", "attention"},
        "pages": {"shared"},
        "conftest": {"shared", "operators"},
        "benchmarks": set(),
    },
}
WITH_NAMES = {"loading", "schedule", "testing", "demo", "cli"}  # rooms whose __init__ is not empty
# No version, date, GPU or author in a name.
VERSIONED = re.compile(r"(?:_v\d+|_(?:a100|h100|h200|b200)|20\d\d[_-]?\d\d)$", re.IGNORECASE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it; relative ones with a leading dot per level."""
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            modules.add(prefix)
            if not node.module:  # from . import name
                modules.update(prefix + alias.name for alias in node.names)
    return modules


def rooms_of(path: Path) -> tuple[str, str]:
    """(package, room) of a file; the package's own __init__ is a room of the package's name."""
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    return package, package if rest == ["__init__"] else rest[0]


def imported_rooms(path: Path) -> set[str]:
    """Rooms of its package that a file imports anywhere in it, its own left out."""
    (package, own), found = rooms_of(path), set()
    inside = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else ()
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == package:  # what is no room is a name of the face
                found.add(rest[0] if rest and rest[0] in ROOMS[package] else package)
    return found - {own}


def definitions(op: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in tree(KERNELS / f"{op}.py").body if isinstance(node, ast.FunctionDef)}


def test_there_are_ops():
    assert {"flow_match_schedule", "euler_step", "cfg_euler_step"} <= set(OPS)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=name_of)
def test_arrows_run_down_only(path):
    """A kernel file knows neither the driver nor diffusers nor another op."""
    modules = imported(path)
    roots = {module.split(".")[0] for module in modules if not module.startswith(".")}
    assert not roots & {"diffusers", "qwen_fast", "qwen_fast_kernels", "benchmarks", "tests"}
    if path.stem != "__init__":
        assert not modules & {f".{op}" for op in OPS}, f"{name_of(path)} imports another op"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "qwen_fast")], ids=name_of)
def test_the_driver_imports_no_test_and_no_benchmark(path):
    """Commands that measure load their benchmark when they run, by one function, which finds it in every installation."""
    assert not {module.split(".")[0] for module in imported(path)} & {"tests", "benchmarks", "qwen_fast_benchmarks"}
    by_name = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and node.value == "qwen_fast_benchmarks"]
    assert not by_name or path == ROOT / "qwen_fast" / "cli" / "benchmarks.py"
    outside = [node for part in tree(path).body if not isinstance(part, ast.FunctionDef) for node in ast.walk(part)]
    called = [node for node in outside if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "benchmarks"]
    assert not called, "a benchmark is loaded where a module is imported"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_what_stands_below(package):
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        if path.is_relative_to(ROOT / package):
            found.setdefault(rooms_of(path)[1], set()).update(imported_rooms(path))
    assert found.keys() == ROOMS[package].keys(), "a room that the table does not know, or that is gone"
    assert {} == {room: others - ROOMS[package][room] for room, others in found.items() if others - ROOMS[package][room]}


@pytest.mark.parametrize("package", ROOMS)
def test_the_table_of_rooms_has_no_circle(package):
    left = dict(ROOMS[package])
    while left:
        lowest = {room for room, below in left.items() if not below & left.keys()}
        assert lowest, f"a circle of {', '.join(left)}"
        left = {room: below for room, below in left.items() if room not in lowest}


def test_what_opens_a_room_is_empty():
    """The command line answers without torch, and the run-book's first stage runs before diffusers is installed."""
    openers = [path for package in ROOMS for path in (ROOT / package).glob("*/**/__init__.py")]
    filled = {rooms_of(path)[1] for path in openers if path.read_text(encoding="utf-8").strip()}
    assert filled == WITH_NAMES


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "benchmarks")], ids=name_of)
def test_benchmarks_import_no_test(path):
    """Nor by bare name, as pytest's path allows it."""
    tests = {"tests"} | {part.stem for part in (ROOT / "tests").rglob("*") if part.suffix == ".py" or part.is_dir()}
    assert not {module.split(".")[0] for module in imported(path) if not module.startswith(".")} & tests


@pytest.mark.parametrize("path", KERNEL_FILES, ids=name_of)
def test_kernels_read_no_environment(path):
    for node in ast.walk(tree(path)):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert name not in {"environ", "getenv"}, f"{name_of(path)}:{node.lineno}"
    assert "os" not in imported(path)


def test_the_kernels_folder_is_no_package():
    """With one, PyPI's `kernels` would be shadowed, which diffusers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("op", OPS)
def test_an_op_file_is_told_in_order(op):
    order = [f"{op}_reference", f"_{op}_kernel", f"launch_{op}", op]
    names = list(definitions(op))
    assert set(order) <= set(names), f"missing: {set(order) - set(names)}"
    positions = [names.index(name) for name in order]
    assert positions == sorted(positions), f"{op}.py: the order is {order}"
    module = tree(KERNELS / f"{op}.py")
    first = (ast.get_docstring(module) or "").splitlines()
    assert first and first[0].endswith("."), "the first line of the docstring says the operation"
    assert re.search(r"^Grid: .+\.$", ast.get_docstring(module), flags=re.MULTILINE), "the grid in one line"


@pytest.mark.parametrize("op", OPS)
def test_the_launcher_takes_its_configuration(op):
    launcher = definitions(op)[f"launch_{op}"]
    assert [argument.arg for argument in launcher.args.kwonlyargs] == ["config"]
    assert launcher.args.kw_defaults == [None], "no default: every caller says which configuration"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_documented_in_the_fixed_fields(op):
    doc = ast.get_docstring(definitions(op)[op]) or ""
    headings = re.findall(r"^(\w+:)", doc, flags=re.MULTILINE)
    assert headings == list(FIELDS)
    assert doc.splitlines()[0].endswith("."), "one line first"
    fields = dict(zip(FIELDS, re.split(r"^(?:Args|Returns|Raises|Error|Traffic|Source):", doc, flags=re.M)[1:], strict=True))
    assert all(text.strip() for text in fields.values()), "an empty field"
    assert re.search(r"diffusers \d+\.\d+", fields["Source:"]), "the source names its version"
    arguments = definitions(op)[op].args
    for argument in arguments.args + arguments.kwonlyargs:
        assert re.search(rf"^\s+{argument.arg} \(", fields["Args:"], flags=re.MULTILINE), f"{argument.arg} is missing"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_registered_exported_and_tested(op):
    source = (KERNELS / f"{op}.py").read_text(encoding="utf-8")
    assert f'"{op}(' in source and f"torch.ops.qwen_fast.{op}(" in source
    (exported,) = [
        ast.literal_eval(node.value)
        for node in tree(KERNELS / "__init__.py").body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    ]
    assert op in exported
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short_and_finished(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES, f"{name_of(path)} is longer than {MAX_LINES} lines"
    assert not re.search(r"#\s*(?:TODO|FIXME|XXX|noqa|pragma: no cover)\b", text), "unfinished or silenced"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_names_carry_no_version(path):
    names = {path.stem}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    assert not [name for name in names if VERSIONED.search(name)]
