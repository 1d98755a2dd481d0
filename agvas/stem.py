"""A pixel encoder that learns from nothing: SAM's ViT behind a convolutional stem, with the stem's features added to its output.

SAM's linear patch embedding and its neck's norms suppose a ViT-H pretrained with masked autoencoding. From random weights they learn
slowly. Convolutions learn sooner (Xiao et al. 2021, "Early convolutions help transformers see better"), and so do the stem's
contrasts: each pixel's distance from the mean of neighbourhoods of several sizes, in units of the picture's own contrast, so that a
dark picture says as much as a bright one. The neck's last norm starts at zero: at first the stem speaks alone, then the ViT adds to it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionEncoderOutput

from agvas.trunk import CHANNELS, Trunk

NEIGHBOURHOODS = (9, 25, 65)  # sides of the square means, in cells of a quarter patch
CONTRASTS = 3 + len(NEIGHBOURHOODS) + 2 + 1  # channels of local contrast
CONTEXTS = 2  # grids coarser than the patches', each of half the side
FLOOR = 0.02  # about one grey level: a blank picture's sensor noise is not blown up beyond it


class ConvolutionNorm(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def fold(self) -> None:
        """Put the normalisation into the convolution, for inference."""
        if len(self) == 3:
            self[0] = fuse_conv_bn_eval(self[0], self[1])
            del self[1]


def two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """To a grid of half the side."""
    return nn.Sequential(ConvolutionNorm(inputs, outputs, stride=2), ConvolutionNorm(outputs, outputs))


class ConvolutionalStem(nn.Module):
    """Stands where SAM's patch embedding stands, and says in its own words what the encoder puts out before the ViT adds to it.

    Features at a quarter patch (cells), half a patch and a patch; behind them two coarser grids and their mean, brought back step by step,
    so that a cell knows what the rest of the picture looks like: a dark area is a defect on one surface and the pattern of another.

    Args:
        width, outputs: channels of the ViT's tokens and of the embeddings.
        trunk: pretrained features to add to all grids but the cells' (agvas/trunk.py); they keep what it learned from photographs, while
            cells keep what it was never shown: lines of a pixel.
    """

    def __init__(self, patch_size: int, width: int, outputs: int, trunk: Trunk | None = None) -> None:
        super().__init__()
        if patch_size % 8:
            raise ValueError(f"a convolutional stem needs a patch size that 8 divides, got {patch_size}")
        self.cell = patch_size // 4
        narrow, middle = 3 * width // 16, 3 * width // 8
        # Two steps: a crack is a pixel or two wide, and one convolution as large as a cell averages it away.
        self.detail = nn.Sequential(
            ConvolutionNorm(3, narrow // 2, self.cell + 1, self.cell // 2), ConvolutionNorm(narrow // 2, narrow, stride=2)
        )
        self.cells = nn.Sequential(ConvolutionNorm(narrow + CONTRASTS, narrow), ConvolutionNorm(narrow, narrow))
        self.halves = two_convolutions(narrow, middle)
        self.patches = two_convolutions(middle, width)
        self.contexts = nn.ModuleList([two_convolutions(width, width) for _ in range(CONTEXTS)])
        self.summary = nn.Conv2d(width, width, 1)
        # Kernels overlap, or each coarse cell would show in the map as a square.
        self.returns = nn.ModuleList([nn.ConvTranspose2d(width, width, 4, stride=2, padding=1) for _ in range(CONTEXTS)])
        self.mix = ConvolutionNorm(width, width)
        # Back to the finer grids, as in a U-Net: what a patch knows of its surroundings says which of its cells matter.
        self.to_halves, self.to_cells = nn.ConvTranspose2d(width, middle, 2, stride=2), nn.ConvTranspose2d(middle, narrow, 2, stride=2)
        self.join_halves, self.join_cells = ConvolutionNorm(2 * middle, middle), ConvolutionNorm(2 * narrow, narrow)
        # A grid of patches hands the mask decoder 4 x 4 cells each.
        self.from_cells = nn.Conv2d(narrow, outputs, 4, stride=4)
        self.from_halves = nn.Conv2d(middle, outputs, 2, stride=2)
        self.from_patches = nn.Conv2d(width, outputs, 1)
        self.trunk = trunk
        if trunk is not None:
            self.laterals = nn.ModuleList(
                ConvolutionNorm(inputs, channels, 1) for inputs, channels in zip(CHANNELS, (middle, *[width] * (1 + CONTEXTS)), strict=True)
            )

    def forward(self, pixel_image: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] → tokens [B, G, G, W] and embeddings [B, P, G, G], G = S / patch."""
        cells, halves, patches = self.features(pixel_image)
        return patches.permute(0, 2, 3, 1), self.embed(cells, halves, patches)

    def features(self, pixel_image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells [B, C, 4 G, 4 G], halves [B, 2 C, 2 G, 2 G] and patches [B, W, G, G], each with its surroundings in mind."""
        cells = self.cells(torch.cat([self.detail(pixel_image), self.contrast(pixel_image)], dim=1))
        halves, *grids = self._coarser(cells, pixel_image)  # from fine to coarse
        patches = grids.pop()
        patches = patches + self.summary(patches.mean(dim=(2, 3), keepdim=True))
        for finer, bring_back in zip(reversed(grids), self.returns, strict=True):
            patches = finer + bring_back(patches)[:, :, : finer.shape[2], : finer.shape[3]]  # an odd side was rounded up
        patches = self.mix(patches)
        halves = self.join_halves(torch.cat([halves, self.to_halves(patches)], dim=1))
        return self.join_cells(torch.cat([cells, self.to_cells(halves)], dim=1)), halves, patches

    def _coarser(self, cells: Tensor, pixel_image: Tensor) -> Iterator[Tensor]:
        """Halves, patches and contexts, each made of the one before; with a trunk, also of what it sees in the picture at half its side."""
        seen: list[Tensor] = []
        if self.trunk is not None:
            features = self.trunk(F.avg_pool2d(pixel_image, 2))
            seen = [lateral(each) for lateral, each in zip(self.laterals, features, strict=True)]
        grid = cells
        for number, level in enumerate((self.halves, self.patches, *self.contexts)):
            grid = level(grid) + seen[number] if seen else level(grid)
            yield grid

    def embed(self, cells: Tensor, halves: Tensor, patches: Tensor) -> Tensor:
        """The three grids as one: [B, P, G, G]."""
        return self.from_cells(cells) + self.from_halves(halves) + self.from_patches(patches)

    def contrast(self, pixel_image: Tensor) -> Tensor:
        """Colour against the small neighbourhood's mean; grey against the larger ones' and the whole picture's; a cell's darkest and
        brightest pixel against the second neighbourhood's mean, since a line thinner than a cell hardly moves the cell's own; how much of
        the largest neighbourhood lies in the picture, since at a border the mean is one-sided and shading alone gives contrast.

        The unit is the geometric mean of the colours' contrast: a large defect hardly raises it, as it would a plain mean.

        Returns:
            [B, CONTRASTS, 4 G, 4 G]; 0 in the padding.
        """
        cells = F.avg_pool2d(pixel_image, self.cell)  # [B, 3, 4 G, 4 G]
        # Padding is exactly zero, and no grey level is: the means subtracted are no integers.
        inside = (cells.abs().sum(dim=1, keepdim=True) > 0).to(cells.dtype)  # [B, 1, 4 G, 4 G]
        area = inside.sum(dim=(2, 3), keepdim=True) + 1e-6
        colour = from_neighbours(cells, inside, NEIGHBOURHOODS[0])
        grey = cells.mean(dim=1, keepdim=True)
        greys = [from_neighbours(grey, inside, side) for side in NEIGHBOURHOODS[1:]]
        pixels = pixel_image.mean(dim=1, keepdim=True)
        for extreme in (-F.max_pool2d(-pixels, self.cell), F.max_pool2d(pixels, self.cell)):
            greys.append((extreme - grey) * inside + greys[0])
        greys.append((grey - grey.sum(dim=(2, 3), keepdim=True) / area) * inside)
        unit = (((colour.abs() + FLOOR).log() * inside).sum(dim=(1, 2, 3), keepdim=True) / (3 * area)).exp()
        share = share_inside(inside, NEIGHBOURHOODS[-1], beyond=True) * inside
        return torch.cat([torch.cat([colour, *greys], dim=1) / unit, share], dim=1)

    def fold(self) -> None:
        for module in self.modules():
            if isinstance(module, ConvolutionNorm):
                module.fold()


def from_neighbours(image: Tensor, inside: Tensor, side: int) -> Tensor:
    """Each pixel less the mean of the pixels inside the picture in the square of `side` around it; 0 outside."""
    share = share_inside(inside, side)
    around = mean_along(mean_along(image, side, axis=3), side, axis=2)
    return (image * share - around) / (share + 1e-6) * inside


def share_inside(inside: Tensor, side: int, beyond: bool = False) -> Tensor:
    """Share of the square of `side` around each pixel that lies inside the picture, [B, 1, 4 G, 4 G]; see mean_along.

    A picture is a rectangle: its rows and its columns say all there is, and cost a hundredth.
    """
    rows, columns = inside.amax(dim=3, keepdim=True), inside.amax(dim=2, keepdim=True)
    # Rows are turned to lie: onnxruntime 1.21 to 1.24 miscount zeros beyond the lower end (its issues 24681, 26708).
    return mean_along(rows.mT, side, axis=3, beyond=beyond).mT * mean_along(columns, side, axis=3, beyond=beyond)


def mean_along(image: Tensor, side: int, axis: int, beyond: bool = False) -> Tensor:
    """Mean over `side` pixels along an axis, 2 or 3, around each one, as far as the tensor goes, or with zeros beyond it."""
    kernel, padding = ((side, 1), (side // 2, 0)) if axis == 2 else ((1, side), (0, side // 2))
    return F.avg_pool2d(image, kernel, stride=1, padding=padding, count_include_pad=beyond)


class StemmedVisionEncoder(SamVisionEncoder):
    """SAM's vision encoder with the stem in place of its patch embedding and the stem's embeddings added to its output."""

    def __init__(self, config: SamVisionConfig, trunk: Trunk | None = None) -> None:
        super().__init__(config)
        self.patch_embed = ConvolutionalStem(config.patch_size, config.hidden_size, config.output_channels, trunk)
        nn.init.zeros_(self.neck.layer_norm2.weight)

    def forward(self, pixel_values: Tensor) -> SamVisionEncoderOutput:
        tokens, embeddings = self.patch_embed(pixel_values)
        hidden = tokens + self.pos_embed
        for layer in self.layers:
            hidden = layer(hidden)
        return SamVisionEncoderOutput(last_hidden_state=self.neck(hidden) + embeddings)
