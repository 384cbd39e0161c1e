"""The tables of the memory page: what lies on the card by arithmetic, and what was measured."""

from .committed import ENABLED, STOCK, case_name, cells, heading, measured_on_gpu, newest, on_gpu, rows_of

# Parameters of Qwen/Qwen-Image's configurations; tests/house/test_pages.py counts them on the meta device.
TRANSFORMER, MODULATION, VAE = 20_430_401_088, 6_796_984_320, 126_892_531
TEXT_ENCODER, TEXT_ENCODER_READ = 8_292_166_656, 7_070_619_136  # read: without vision tower and head, which a prompt never asks
BLOCK = 339_831_296  # under group offload the one that works and the one that travels are on the card
LAYER = 544_997_376  # the text encoder's largest, its embedding
GIB = 2**30


def _gib(parameters: float, size: float = 2) -> float:
    return parameters * size / GIB


def resident_memory() -> list[str]:
    """Weights on the card while a prompt is encoded and while the picture is denoised, by recipe."""
    rest = TRANSFORMER - MODULATION
    whole = _gib(TRANSFORMER + TEXT_ENCODER + VAE)
    lines = heading("card", "recipe", "weights while encoding", "weights while denoising")
    for card, recipe, encoding, denoising in (
        ("80 GB", '`from_pretrained(..., device="cuda")`, nothing else', whole, whole),
        (
            "80 GB",
            '`text_encoder_mode="offload"`',
            _gib(TRANSFORMER + TEXT_ENCODER_READ + VAE),
            _gib(TRANSFORMER + VAE),
        ),
        (
            "48 GB",
            '`from_pretrained(..., device="cuda")`: the modulation weights stay in host memory by themselves',
            _gib(rest + TEXT_ENCODER + VAE),
            _gib(rest + TEXT_ENCODER + VAE),
        ),
        (
            "48 GB",
            'the same with `text_encoder_mode="offload"`',
            _gib(rest + TEXT_ENCODER_READ + VAE),
            _gib(rest + VAE),
        ),
        (
            "24 GB",
            "`enable_layerwise_casting` to 8 bits, then `enable_model_cpu_offload()`",
            _gib(TEXT_ENCODER),
            _gib(TRANSFORMER, 1),
        ),
        (
            "24 GB",
            "group offload: of the transformer by blocks, of the text encoder by layers",
            _gib(LAYER + VAE),
            _gib(2 * BLOCK + VAE),
        ),
        (
            "24 GB",
            "a GGUF transformer of 4.5 bits a weight, `enable_model_cpu_offload()`",
            _gib(TEXT_ENCODER),
            _gib(TRANSFORMER, 4.5 / 8),
        ),
    ):
        lines.append(cells(card, recipe, f"{encoding:.1f} GiB", f"{denoising:.1f} GiB"))
    return lines


def measured_memory() -> list[str]:
    """The largest allocation while a picture was drawn, transformer and VAE on the card and the prompt given as embeddings."""
    rows = [row for row in measured_on_gpu(STOCK, ENABLED) if row["peak_gib"]]
    if not rows:
        return ["No row of a GPU is committed yet."]
    cases = dict.fromkeys((row["machine"], row["dtype"], case_name(row)) for row in rows)
    found = {(row["machine"], row["dtype"], case_name(row), row["rung"]): row for row in rows}
    lines = heading("picture", "weights", "peak, stock diffusers", "peak, qwen_fast", "card")
    for machine, dtype, case in cases:
        stock, ours = (found.get((machine, dtype, case, rung)) for rung in (STOCK, ENABLED))
        if stock is not None and ours is not None:
            figures = (f"{float(value):.1f} GiB" for value in (stock["resident_gib"], stock["peak_gib"], ours["peak_gib"]))
            lines.append(cells(case, *figures, f"{machine}, {dtype}"))
    return lines


def measured_recipes() -> list[str]:
    """What recipes for less memory cost, of a picture with guidance, without a text encoder."""
    rows = [row for row in rows_of("memory") if on_gpu(row) and row["status"] == "ok"]
    lines = []
    for row in newest(rows, "machine", "dtype", "recipe", "way", "width", "height"):
        who = {"stock": "stock diffusers", "ours": "qwen_fast"}[row["way"]]
        figures = (
            f"{float(row['resident_gib']):.1f} GiB",
            f"{float(row['peak_gib']):.1f} GiB",
            f"{float(row['step_ms']):.0f} ms",
        )
        lines.append(cells(f"{row['recipe']}, {row['width']}x{row['height']}", who, *figures, row["machine"]))
    if not lines:
        return ["No row of a GPU is committed yet."]
    return heading("recipe", "drawn by", "weights", "peak", "a step", "card") + lines
