"""What one picture costs in arithmetic and memory traffic, stage by stage, from a checkpoint's configuration alone.

Everything that counts is a matrix product (a convolution is one, too), so a stage is a list of products. FLOPs are two per
multiplication and addition, as torch's counter counts them; the tests hold the formulas against that counter. Norms, activations,
resampling and the stem's contrasts are left out: they move memory but hardly compute. Nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from agvas.config import TRUNK_FIRST, TRUNK_STAGES, TRUNK_TAPS, AGVASConfig

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 128}  # int4 with an fp16 scale for each 128 weights
CHAT_TOKENS = 78  # of the paper's prompt and instruction, around the images' tokens, and the answer
STEM_CONTRASTS, STEM_CONTEXTS = 9, 2  # as in agvas/stem.py, which loads torch; a test compares them
ANSWER_ROWS = 11  # positions whose states and logits are read: the answer's and the one before it


@dataclass(frozen=True)
class Product:
    """`count` products of [rows, inputs] by [inputs, outputs]; `weights` where the second factor belongs to the model."""

    rows: int
    inputs: int
    outputs: int
    count: int = 1
    weights: bool = True

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs * self.count

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs * self.count if self.weights else 0


@dataclass(frozen=True)
class StageWork:
    """One stage on one picture.

    Attributes:
        flops: of its matrix products.
        parameters: weights that they multiply by.
        passed: numbers that the stage reads and writes at its borders (float32 in this package).
    """

    flops: int
    parameters: int
    passed: int

    def bytes(self, precision: str) -> float:
        """The least traffic: every weight read once in `precision`, what is passed between stages once in float32."""
        return self.parameters * BYTES[precision] + self.passed * 4.0


def stage_work(config: AGVASConfig, text_tokens: int = CHAT_TOKENS, rows: int = ANSWER_ROWS) -> dict[str, StageWork]:
    """Work of every stage in direct mode, in one language pass.

    Args:
        text_tokens: tokens of the language pass that are no image's: prompt, instruction and draft.
        rows: positions that the head is computed at.
    """
    tokens = (2 if config.spam else 1) * config.semantic.tokens + text_tokens
    pixel, semantic, language = config.pixel, config.semantic, config.language
    embeddings, aligned = pixel.output_width * pixel.grid**2, semantic.tokens * language.width
    features = semantic.tokens * semantic.width
    head_width = language.width // language.heads
    past = 2 * language.layers * language.key_value_heads * head_width * tokens
    passed = {
        "pixel_encoder": 3 * pixel.image_size**2 + embeddings,
        "semantic_encoder": 3 * semantic.image_size**2 + features + aligned,
        "spam": features + embeddings + aligned,
        "language": tokens * language.width + rows * (language.width + language.vocabulary) + past,
        "mask_decoder": 3 * language.width + embeddings + 4 * (4 * pixel.grid) ** 2,
    }
    products = {
        "pixel_encoder": pixel_encoder(config),
        "semantic_encoder": semantic_encoder(config),
        "spam": spam(config),
        "language": language_pass(config, tokens, rows),
        "mask_decoder": mask_decoder(config),
    }
    return {
        name: StageWork(sum(p.flops for p in listed), sum(p.parameters for p in listed), passed[name])
        for name, listed in products.items()
        if listed
    }


def pixel_encoder(config: AGVASConfig) -> list[Product]:
    """SAM's ViT as it is exported: attention covers whole windows, all else the picture's tokens (export.adapters.WindowLayer)."""
    pixel = config.pixel
    grid, width, heads = pixel.grid**2, pixel.width, pixel.heads
    found = [Product(grid, 3 * pixel.patch_size**2, width)] if pixel.stem == "linear" else _stem(config)
    for layer in range(pixel.layers):
        side = pixel.grid if layer in pixel.global_layers else pixel.window
        windows = (-(-pixel.grid // side)) ** 2
        found += [
            Product(grid, width, 3 * width),
            Product(side**2, width // heads, side**2, windows * heads, weights=False),
            Product(side**2, side**2, width // heads, windows * heads, weights=False),
            # Relative positions: each query with the rows' and the columns' table.
            Product(side**2, width // heads, side, 2 * windows * heads, weights=False),
            Product(grid, width, width),
            Product(grid, width, pixel.mlp_width),
            Product(grid, pixel.mlp_width, width),
        ]
    neck = pixel.output_width
    return [*found, Product(grid, width, neck), Product(grid, 9 * neck, neck)]


def _stem(config: AGVASConfig) -> list[Product]:
    """agvas/stem.py's convolutions; its contrasts are means, no products."""
    pixel = config.pixel
    cells, halves, patches = (4 * pixel.grid) ** 2, (2 * pixel.grid) ** 2, pixel.grid**2
    wide, cell = pixel.width, pixel.patch_size // 4
    narrow, middle, outputs = 3 * wide // 16, 3 * wide // 8, pixel.output_width
    stride = cell // 2
    found = [
        Product((pixel.image_size // stride) ** 2, 3 * (cell + 1) ** 2, narrow // 2),
        Product(cells, 9 * (narrow // 2), narrow),
        Product(cells, 9 * (narrow + STEM_CONTRASTS), narrow),
        Product(cells, 9 * narrow, narrow),
        Product(halves, 9 * narrow, middle),
        Product(halves, 9 * middle, middle),
        Product(patches, 9 * middle, wide),
        Product(patches, 9 * wide, wide),
    ]
    side = pixel.grid
    for _ in range(STEM_CONTEXTS):
        side = -(-side // 2)
        found += [Product(side**2, 9 * wide, wide, 2), Product(side**2, wide, 16 * wide)]  # and the way back
    return [
        *found,
        Product(1, wide, wide),  # summary
        Product(patches, 9 * wide, wide),  # mix
        Product(patches, wide, 4 * middle),
        Product(halves, middle, 4 * narrow),
        Product(halves, 18 * middle, middle),
        Product(cells, 18 * narrow, narrow),
        Product(patches, 16 * narrow, outputs),
        Product(patches, 4 * middle, outputs),
        Product(patches, wide, outputs),
        *(_trunk(config) if pixel.stem == "pretrained" else []),
    ]


def _trunk(config: AGVASConfig) -> list[Product]:
    """agvas/trunk.py's convolutions on the picture at half its side, and those that bring its features to the stem's grids."""
    side, width = config.pixel.image_size // 4, TRUNK_FIRST
    found = [Product(side**2, 27, width)]
    stem_widths = iter((3 * config.pixel.width // 8, *[config.pixel.width] * (1 + STEM_CONTEXTS)))
    for number, (kernel, stride, expansion, outputs, blocks) in enumerate(TRUNK_STAGES):
        for block in range(blocks):
            inner = width * expansion
            if expansion > 1:
                found.append(Product(side**2, width, inner))
            side //= stride if block == 0 else 1
            found += [Product(side**2, kernel**2, 1, inner), Product(side**2, inner, outputs)]
            width = outputs
        if number in TRUNK_TAPS:
            found.append(Product(side**2, outputs, next(stem_widths)))
    return found


def semantic_encoder(config: AGVASConfig) -> list[Product]:
    """SigLIP and LLaVA's projector."""
    semantic = config.semantic
    tokens, width, layers, heads = semantic.tokens, semantic.width, semantic.layers, semantic.heads
    return [
        Product(tokens, 3 * semantic.patch_size**2, width),
        Product(tokens, width, width, 4 * layers),
        Product(tokens, width // heads, tokens, layers * heads, weights=False),
        Product(tokens, tokens, width // heads, layers * heads, weights=False),
        Product(tokens, width, semantic.mlp_width, layers),
        Product(tokens, semantic.mlp_width, width, layers),
        Product(tokens, width, config.language.width),
        Product(tokens, config.language.width, config.language.width),
    ]


def spam(config: AGVASConfig) -> list[Product]:
    """None for a model without it."""
    if config.spam is None:
        return []
    width, heads, tokens, grid = config.spam.width, config.spam.heads, config.semantic.tokens, config.pixel.grid**2
    return [
        Product(tokens, config.semantic.width, width),
        Product(grid, config.pixel.output_width, width),
        Product(tokens, width, width),
        Product(grid, width, width, 2),
        Product(tokens, width // heads, grid, heads, weights=False),
        Product(tokens, grid, width // heads, heads, weights=False),
        Product(tokens, width, config.language.width),
    ]


def language_pass(config: AGVASConfig, tokens: int, rows: int) -> list[Product]:
    """Qwen2 over `tokens`; the last layer's queries, output map and MLP, and the head, at `rows` alone (export.adapters.LanguageStage).

    Attention counts all pairs, those above the diagonal included, as the graph computes them.
    """
    language = config.language
    width, heads = language.width, language.heads
    head = width // heads
    narrow = language.key_value_heads * head
    found = []
    for layer in range(language.layers):
        asking = rows if layer == language.layers - 1 else tokens
        found += [
            Product(asking, width, width, 2),
            Product(tokens, width, narrow, 2),
            Product(asking, head, tokens, heads, weights=False),
            Product(asking, tokens, head, heads, weights=False),
            Product(asking, width, language.mlp_width, 3),
        ]
    return [*found, Product(rows, width, language.vocabulary)]


def mask_decoder(config: AGVASConfig) -> list[Product]:
    """Token refiner, SAM's two-way blocks, upscaling and one small MLP for each anchor. The grid's positions are constants of a graph."""
    decoder, wide, width = config.mask_decoder, config.language.width, config.pixel.output_width
    anchors = len(decoder.roles)
    asking, grid, half, heads = 2 * anchors, config.pixel.grid**2, width // 2, decoder.heads

    def attention(queries: int, keys: int, inner: int) -> list[Product]:
        return [
            Product(queries, width, inner),
            Product(keys, width, inner, 2),
            Product(queries, inner // heads, keys, heads, weights=False),
            Product(queries, keys, inner // heads, heads, weights=False),
            Product(queries, inner, width),
        ]

    found = [Product(anchors, wide, wide), Product(anchors, wide, width)]
    for _ in range(decoder.layers):
        found += attention(asking, asking, width)
        found += attention(asking, grid, half)
        found += [Product(asking, width, decoder.mlp_width), Product(asking, decoder.mlp_width, width)]
        found += attention(grid, asking, half)
    found += attention(asking, grid, half)
    return [
        *found,
        Product(grid, width, 4 * (width // 4)),
        Product(4 * grid, width // 4, 4 * (width // 8)),
        Product(1, width, width, 2 * anchors),
        Product(1, width, width // 8, anchors),
        Product(anchors, width // 8, 16 * grid, weights=False),
    ]
