"""The tables of what is drawn besides one picture of given embeddings: prompts, edits and ControlNets, LoRA, batches."""

from .committed import CASE, ENABLED, Row, case_name, cells, guidance, heading, newest, on_gpu, rows_of

_NONE = ["No row of a GPU is committed yet."]
INVARIANT = "+ batch_invariant"
_LORA = {  # in words, in this order
    "stock": "stock diffusers, no LoRA",
    "stock with LoRA": "stock diffusers, LoRA as layers",
    "none": "qwen_fast, no LoRA",
    "fused": "qwen_fast, fused into the weights",
    "beside": "qwen_fast, as it is loaded",
}

_WHOLE = {
    "stock": "stock diffusers",
    "ours": "qwen_fast",
    "ours, text encoder in host memory": 'qwen_fast, `text_encoder_mode="offload"`',
}


def whole() -> list[str]:
    """A picture from its prompt, with every step drawn and all parts of the model on the card."""
    rows = [row for row in rows_of("whole") if on_gpu(row) and row["status"] == "ok"]
    if not rows:
        return _NONE
    picture, lines = case_name(rows[-1]), []  # of which the table is
    for row in newest((row for row in rows if case_name(row) == picture), "machine", "dtype", "way"):
        seconds = (f"{float(row[name]):.1f} s" if row[name] else "" for name in ("first_s", "image_s", "known_s"))
        lines.append(cells(_WHOLE[row["way"]], *seconds, f"{float(row['peak_gib']):.1f} GiB", row["machine"]))
    names = ("first call", "later ones", "prompt seen before", "peak of memory", "card")
    return heading(f"from prompt to picture, {picture}", *names) + lines


def edits() -> list[str]:
    """A step of the other pipelines."""
    rows = [row for row in rows_of("edits") if on_gpu(row) and row["status"] == "ok"]
    lines = []
    for row in newest(rows, "machine", "dtype", "case", "width", "height"):
        figures = (f"{float(row[name]):.0f} ms" for name in ("stock_step_ms", "step_ms"))
        name = f"{row['case']}, {row['width']}x{row['height']}, {guidance(row)}"
        lines.append(cells(name, *figures, f"{float(row['speedup_step']):.2f}x", f"{row['machine']}, {row['dtype']}"))
    return heading("a step of", "stock diffusers", "qwen_fast", "speed-up", "measured on") + lines if lines else _NONE


def lora() -> list[str]:
    """A step with a LoRA, by way, of pictures of a megapixel."""
    rows = [row for row in rows_of("lora") if on_gpu(row) and row["width"] == row["height"] == "1024"]
    found = {row["way"]: row for row in rows}
    lines = [
        cells(words, f"{float(found[way]['step_ms']):.0f} ms", f"rank {found[way]['rank']}, {found[way]['machine']}")
        for way, words in _LORA.items()
        if way in found
    ]
    return heading("1024x1024, CFG", "a step", "measured with") + lines if lines else _NONE


def invariant() -> list[str]:
    """What it costs that no picture depends on its batch."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows_of("ladder"):
        if on_gpu(row) and row["status"] == "ok" and row["rung"] in (ENABLED, INVARIANT):
            found.setdefault(tuple(row[name] for name in ("machine", "dtype", "commit", *CASE)), {})[row["rung"]] = row
    pairs = [rungs[INVARIANT] | {"plain_ms": rungs[ENABLED]["step_ms_p50"]} for rungs in found.values() if len(rungs) == 2]
    lines = []
    for row in newest(pairs, "machine", "dtype", *CASE):
        plain, alone = float(row["plain_ms"]), float(row["step_ms_p50"])
        price = f"{100 * (alone / plain - 1):.1f} %"
        lines.append(cells(case_name(row), f"{plain:.0f} ms", f"{alone:.0f} ms", price, row["machine"]))
    return heading("a step of", "as enabled", "batch_invariant", "price", "card") + lines if lines else _NONE


def sizes() -> list[str]:
    """Pictures of several sizes in one call."""
    rows = [row for row in rows_of("sizes") if on_gpu(row) and row["status"] == "ok"]
    lines = []
    for row in newest(rows, "machine", "sizes", "steps", "cfg", "way"):
        gains = f"{float(row['speedup_to_stock']):.2f}x" if row["speedup_to_stock"] else ""
        what = f"{row['sizes'].replace(' ', ', ')}; {row['steps']} steps, {guidance(row)}"
        lines.append(cells(what, row["way"], f"{float(row['s_p50']):.2f} s", gains, row["machine"]))
    return heading("pictures", "drawn by", "all of them", "speed-up", "card") + lines if lines else _NONE
