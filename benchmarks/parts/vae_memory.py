"""Memory of a VAE decode: the layers' estimate against tensor bytes counted on a CPU, and the estimate at the full width.

    python -m benchmarks.parts.vae_memory [--append benchmarks/results/vae_memory.csv]

Counted rows run a narrow VAE (base_dim 8) in bf16; the full width's rows are arithmetic, which needs neither weights nor a
GPU. What a convolution takes and frees inside itself is in neither.
"""

import argparse
import datetime
import weakref
from pathlib import Path

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qwen_fast
from qwen_fast.testing import initialize
from qwen_fast.vae.bands import choose
from qwen_fast.vae.layers import decoder_layers

from ..shared.rows import append
from ..shared.source import git

FIELDS = "date commit dirty dtype base_dim pixels limit_mib bands overhead estimate_mib counted_mib".split()
MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """What an allocator would have to give, without one to ask: bytes of tensors alive at once, counted at every operation.

    Inside the context, counts the storages that operations return, from then until nothing refers to them. Tensors on the meta
    device have no memory and are not counted.

    Attributes:
        peak (int): the most at any time. Inputs that were there before, and what an operation takes and frees inside, are not
            in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        outputs = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if not isinstance(leaf, torch.Tensor) or leaf.is_meta:
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in known and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._freed, key)
        return outputs

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def plan_of(vae, pixels: int, dtype: torch.dtype, limit: int | None):
    return choose(decoder_layers(vae), torch.Size((1, 16, pixels // 8, pixels // 8)), dtype.itemsize, limit)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024, 4096], help="of the counted rows")
    parser.add_argument("--append", type=Path, help="CSV file that gets the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype, rows = torch.bfloat16, []

    def row(base_dim: int, pixels: int, limit: int | None, plan, counted: int | None) -> None:
        limit_text = "" if limit is None else f"{limit / MIB:.1f}"
        counted_text = "" if counted is None else f"{counted / MIB:.1f}"
        sizes = [limit_text, plan.bands, f"{plan.overhead:.4f}", f"{plan.peak / MIB:.1f}", counted_text]
        dirty = bool(git("status", "--porcelain"))
        rows.append([datetime.date.today(), git("rev-parse", "--short", "HEAD"), dirty, "bfloat16", base_dim, pixels, *sizes])
        print(dict(zip(FIELDS, rows[-1], strict=True)), flush=True)

    with torch.device("meta"):
        full = diffusers.AutoencoderKLQwenImage()
    for pixels in (1024, 2048, 4096):
        for limit in (None, 6 * 2**30, 2 * 2**30):
            row(96, pixels, limit, plan_of(full, pixels, dtype, limit), None)
    narrow = diffusers.AutoencoderKLQwenImage(base_dim=8)
    initialize(narrow, "vae", 0)
    narrow = torch.nn.Module.to(narrow, dtype).eval()
    for pixels in options.pixels:
        latents = torch.randn(1, 16, 1, pixels // 8, pixels // 8).to(dtype)
        whole = plan_of(narrow, pixels, dtype, None).peak
        for limit in (None, whole // 3):
            qwen_fast.enable_vae(narrow, memory=limit)
            with LiveBytes() as counter:
                narrow.decode(latents)
            row(8, pixels, limit, plan_of(narrow, pixels, dtype, limit), counter.peak)
    if options.append:
        append(options.append, FIELDS, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
