"""Finds the benchmarks, wherever they are installed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def benchmarks(module: str) -> ModuleType:
    """A module of the benchmarks, which only commands import, when they run.

    They are installed as `qwen_fast_benchmarks`. In a checkout, also an editable installation of one, they are the folder
    beside the driver, under the same name: a package `benchmarks` on the path may be anybody's.

    Raises:
        ImportError: neither is there.
    """
    import qwen_fast

    name, root = "qwen_fast_benchmarks", Path(qwen_fast.__file__).parents[1]
    if name not in sys.modules and (root / "kernels" / "qwen_fast_kernels").is_dir():
        folder = root / "benchmarks"
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.{module}")
