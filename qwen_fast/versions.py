"""The versions of other packages that qwen_fast works with, checked when it is imported."""

import importlib.metadata
import warnings
from collections.abc import Mapping

from packaging.version import Version

# NumPy 2: the schedule is bit-equal to diffusers' only under its rule that Python floats do not widen fp32 (NEP 50).
LOWEST = {"torch": "2.8", "diffusers": "0.38", "transformers": "4.57", "numpy": "2.0"}
UNTESTED = {"diffusers": "0.43", "transformers": "6"}


def installed_versions() -> dict[str, str]:
    """Version by package, of those qwen_fast depends on; a package that is missing is left out."""
    found = {}
    for package in LOWEST:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def problems(installed: Mapping[str, str]) -> list[str]:
    """One sentence for each package that is missing or too old: what was found, what is needed, how to get it."""
    found = []
    for package, lowest in LOWEST.items():
        if package not in installed:
            found.append(f"{package} is not installed, {lowest} or newer is needed: pip install '{package}>={lowest}'")
        elif Version(installed[package]) < Version(lowest):
            found.append(
                f"{package} {installed[package]} is too old, {lowest} or newer is needed: pip install -U '{package}>={lowest}'"
            )
    return found


def untested(installed: Mapping[str, str]) -> list[str]:
    """One sentence for each package newer than what was compared with stock."""
    return [
        f"{package} {installed[package]} is newer than what qwen_fast was compared with (below {first}); check that pictures "
        "equal stock's, or pin the older one"
        for package, first in UNTESTED.items()
        if package in installed and Version(installed[package]) >= Version(first)
    ]


def check() -> None:
    """Raise an ImportError that names every package that is too old; warn of those that are too new to be known."""
    installed = installed_versions()
    if found := problems(installed):
        raise ImportError("qwen_fast cannot work with these packages: " + "; ".join(found))
    for sentence in untested(installed):
        warnings.warn(sentence, stacklevel=2)
