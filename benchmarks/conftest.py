"""`pytest benchmarks --benchmark-only`: on the current GPU at the model's sizes, without one on a CPU thread at small ones."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compiled", action="store_true", help="measure torch.compile of the references on the CPU too (slow)")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    """Versions and the GPU, into every result file."""
    import diffusers

    machine_info |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    try:
        import triton

        machine_info["triton"] = triton.__version__
    except ImportError:
        machine_info["triton"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        machine_info |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        machine_info["cuda"] = torch.version.cuda


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
