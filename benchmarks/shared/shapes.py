"""What is measured: model shapes, cases, the work that a step is, and the default and full selections."""

from dataclasses import dataclass, replace

STEPS_MEASURED = 4  # ms per step is steady after the first
COMPARED_STEPS = 2  # of which latents are compared with stock's
PROMPT_LENGTHS = (1.0, 0.25, 0.7, 0.45)  # of a batch, as parts of the text length: no two prompts are equally long
NEGATIVE_TOKENS = 6  # of the negative prompt " "


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen-Image transformer and of the VAE beside it."""

    layers: int = 60
    heads: int = 24
    head_dim: int = 128
    text_width: int = 3584
    vae_base_dim: int = 96

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Rotary channels of frame, height and width, in Qwen-Image's proportions."""
        return self.head_dim // 8, self.head_dim * 7 // 16, self.head_dim * 7 // 16

    @property
    def modulation_parameters(self) -> int:
        """img_mod, txt_mod and norm_out: what a modulation table makes idle."""
        width = self.width
        return self.layers * 2 * (6 * width * width + 6 * width) + 2 * width * width + 2 * width

    @property
    def parameters(self) -> int:
        """Of the transformer."""
        width, text = self.width, self.text_width
        attention = 2 * 4 * (width * width + width) + 4 * self.head_dim
        mlp = 2 * (2 * 4 * width * width + 5 * width)
        embedders = (64 * width + width) + text + (text * width + width) + (256 * width + width) + (width * width + width)
        return self.layers * (attention + mlp) + self.modulation_parameters + embedders + 64 * width + 64


QWEN_IMAGE = Shape()
# What a CPU shows in seconds; "tiny" is for tests.
SHAPES = {
    "qwen-image": QWEN_IMAGE,
    "middle": Shape(layers=4, heads=8, head_dim=64, text_width=64, vae_base_dim=8),
    "tiny": Shape(layers=2, heads=2, head_dim=32, text_width=32, vae_base_dim=8),
}


@dataclass(frozen=True)
class Work:
    """Products of a step: (M, K, N, how often) of matrices, (queries, keys, heads, head_dim, how often) of attentions."""

    products: tuple[tuple[int, int, int, int], ...]
    attentions: tuple[tuple[int, int, int, int, int], ...]

    @property
    def product_flops(self) -> float:
        return sum(2.0 * m * k * n * count for m, k, n, count in self.products)

    @property
    def attention_flops(self) -> float:
        return sum(4.0 * queries * keys * heads * dim * count for queries, keys, heads, dim, count in self.attentions)


@dataclass(frozen=True)
class PictureCase:
    """One picture size, step count, guidance, batch and text length on a model of `shape`."""

    width: int = 1024
    height: int = 1024
    steps: int = 50
    cfg: bool = True
    batch: int = 1
    text: int = 128
    shape: Shape = QWEN_IMAGE

    def __str__(self) -> str:
        guidance = "CFG" if self.cfg else "no CFG"
        return f"{self.width}x{self.height}, {self.steps} steps, {guidance}, batch {self.batch}, text {self.text}"

    @property
    def image_tokens(self) -> int:
        return (self.width // 16) * (self.height // 16)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt of the batch."""
        return tuple(max(1, round(self.text * part)) for part in (PROMPT_LENGTHS * self.batch)[: self.batch])

    def work(self) -> Work:
        """What no exact implementation of a step can leave out: products and attention of both predictions.

        Modulations, text projection and embedders are left out, since they can be computed once a schedule or prompt, and
        elementwise passes, since they can ride in a product's epilogue. Of the last block's text only keys and values count.
        """
        shape, image = self.shape, self.image_tokens
        width, layers = shape.width, shape.layers
        texts = [*self.text_lengths, *([NEGATIVE_TOKENS] * self.batch if self.cfg else [])]
        # Both predictions' rows lie in one product: the weights are read once.
        rows, text_rows = image * len(texts), sum(texts)
        products = []
        for tokens, count in ((rows, layers), (text_rows, layers - 1)):
            products += [
                (tokens, width, width, 4 * count),
                (tokens, width, 4 * width, count),
                (tokens, 4 * width, width, count),
            ]
        products += [(text_rows, width, width, 2), (rows, 64, width, 1), (rows, width, 64, 1)]
        head, attentions = (shape.heads, shape.head_dim), []
        for length in texts:
            attentions += [(image + length, image + length, *head, layers - 1), (image, image + length, *head, 1)]
        return Work(tuple(products), tuple(attentions))


def default_cases(shape: Shape) -> list[PictureCase]:
    """What a borrowed GPU is worth: the picture everybody quotes, launch-bound sizes, few steps, a ragged batch, long text."""
    base = PictureCase(shape=shape)
    return [
        base,
        replace(base, width=512, height=512, steps=20),
        replace(base, steps=8, cfg=False),
        replace(base, width=512, height=512, steps=4, cfg=False, text=16),
        replace(base, width=512, height=512, steps=20, batch=4),
        replace(base, width=1328, height=1328, text=512),
    ]


def full_cases(shape: Shape) -> list[PictureCase]:
    """Every size x steps x guidance x batch x text length, the picture everybody quotes first."""
    grid = [
        PictureCase(width, height, steps, cfg, batch, text, shape)
        for width, height in ((512, 512), (768, 768), (1024, 1024), (1328, 1328), (1664, 928))
        for batch in (1, 4)
        for text in (16, 128, 512)
        for cfg in (True, False)
        for steps in (4, 8, 20, 50)
    ]
    return sorted(grid, key=lambda case: case != PictureCase(shape=shape))


def small_cases(shape: Shape) -> list[PictureCase]:
    """The default on a CPU."""
    return [
        PictureCase(256, 256, 20, True, 1, 16, shape),
        PictureCase(256, 256, 4, False, 1, 16, shape),
        PictureCase(128, 128, 4, True, 4, 16, shape),
    ]
