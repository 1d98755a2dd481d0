"""A pixel encoder that learns from nothing: SAM's ViT behind a convolutional stem, with the stem's features added to its output.

SAM's linear patch embedding and its neck's norms suppose a ViT-H pretrained with masked autoencoding. From random weights they learn
slowly. Convolutions learn sooner (Xiao et al. 2021, "Early convolutions help transformers see better"), and so do the stem's two
local contrasts: each pixel's distance from the mean of its neighbourhood, in units of the picture's own contrast, so that a dark
picture says as much as a bright one. The neck's last norm starts at zero: at first the stem speaks alone, then the ViT adds to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionEncoderOutput

NEIGHBOURHOODS = (9, 25)  # sides of the square means, in cells of a quarter patch
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


class ConvolutionalStem(nn.Module):
    """[B, 3, S, S] → [B, G, G, W], G = S / patch; stands where SAM's patch embedding stands."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        if patch_size % 4:
            raise ValueError(f"a convolutional stem needs a patch size that 4 divides, got {patch_size}")
        self.cell = patch_size // 4
        narrow, middle = 3 * width // 16, 3 * width // 8
        self.detail = ConvolutionNorm(3, narrow, 2 * self.cell + 1, self.cell)
        self.levels = nn.Sequential(
            ConvolutionNorm(narrow + 4, middle, stride=2),
            ConvolutionNorm(middle, middle),
            ConvolutionNorm(middle, width, stride=2),
            ConvolutionNorm(width, width),
        )
        self.projection = nn.Conv2d(width, width, 1)

    def forward(self, pixel_image: Tensor) -> Tensor:
        features = torch.cat([self.detail(pixel_image), self.contrast(pixel_image)], dim=1)
        return self.projection(self.levels(features)).permute(0, 2, 3, 1)

    def contrast(self, pixel_image: Tensor) -> Tensor:
        """Colour against the small neighbourhood's mean, grey against the large one's: [B, 4, 4 G, 4 G]; 0 in the padding.

        The unit is the geometric mean of the colours' contrast: a large defect hardly raises it, as it would a plain mean.
        """
        cells = F.avg_pool2d(pixel_image, self.cell)  # [B, 3, 4 G, 4 G]
        # Padding is exactly zero, and no grey level is: the means subtracted are no integers.
        inside = (cells.abs().sum(dim=1, keepdim=True) > 0).to(cells.dtype)  # [B, 1, 4 G, 4 G]
        small, large = NEIGHBOURHOODS
        colour = from_neighbours(cells, inside, small)
        grey = from_neighbours(cells.mean(dim=1, keepdim=True), inside, large)
        logarithms = (colour.abs() + FLOOR).log() * inside
        count = 3 * inside.sum(dim=(1, 2, 3), keepdim=True) + 1e-6
        unit = (logarithms.sum(dim=(1, 2, 3), keepdim=True) / count).exp()
        return torch.cat([colour, grey], dim=1) / unit

    def fold(self) -> None:
        for module in self.modules():
            if isinstance(module, ConvolutionNorm):
                module.fold()


def from_neighbours(image: Tensor, inside: Tensor, side: int) -> Tensor:
    """Each pixel less the mean of the pixels inside the picture in the square of `side` around it; 0 outside."""
    share = box_mean(inside, side)
    return (image * share - box_mean(image, side)) / (share + 1e-6) * inside


def box_mean(image: Tensor, side: int) -> Tensor:
    """Mean over the square of `side` around each pixel, as far as the tensor goes; rows, then columns."""
    rows = F.avg_pool2d(image, (1, side), stride=1, padding=(0, side // 2), count_include_pad=False)
    return F.avg_pool2d(rows, (side, 1), stride=1, padding=(side // 2, 0), count_include_pad=False)


class StemmedVisionEncoder(SamVisionEncoder):
    """SAM's vision encoder with the stem in place of its patch embedding and a 1×1 convolution from the stem to its output."""

    def __init__(self, config: SamVisionConfig) -> None:
        super().__init__(config)
        self.patch_embed = ConvolutionalStem(config.patch_size, config.hidden_size)
        self.skip = nn.Conv2d(config.hidden_size, config.output_channels, 1)
        nn.init.zeros_(self.neck.layer_norm2.weight)

    def forward(self, pixel_values: Tensor) -> SamVisionEncoderOutput:
        patches = self.patch_embed(pixel_values)  # [B, G, G, W]
        hidden = patches + self.pos_embed
        for layer in self.layers:
            hidden = layer(hidden)
        return SamVisionEncoderOutput(last_hidden_state=self.neck(hidden) + self.skipped(patches))

    def skipped(self, patches: Tensor) -> Tensor:
        """What the output starts as: [B, G, G, W] → [B, P, G, G]."""
        return self.skip(patches.permute(0, 3, 1, 2))
