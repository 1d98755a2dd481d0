"""The light runtime: open a bundle, segment pictures. Needs NumPy, Pillow, tokenizers and one engine; no torch, no onnx.

from runtime import Segmenter
segmenter = Segmenter("bundle/")
result = segmenter("part.png")
"""

from runtime.inspection import Inspection
from runtime.recipe import Recipe
from runtime.segmentation import Segmentation
from runtime.segmenter import Segmenter
from runtime.stream import Streamed
from runtime.version import package_version

__version__ = package_version()
__all__ = ["Inspection", "Recipe", "Segmentation", "Segmenter", "Streamed", "__version__"]
