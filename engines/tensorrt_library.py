"""TensorRT and TensorRT for RTX as one library: which module an engine's name means, its version, and the GPUs it builds for.

Both have the same Python interface. TensorRT builds on the GPU that will run the engine; TensorRT for RTX builds ahead of time for the
compute capabilities it knows, on a machine without a GPU, and the device compiles the rest when it first runs. Nothing is imported
until it is asked for: loading the library takes a third of a second and hundreds of megabytes.
"""

from __future__ import annotations

import sys
from typing import Any

from engines.errors import EngineUnavailable, let_interrupt_pass

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
TENSORRT_ENGINES = (TENSORRT, TENSORRT_RTX)
# The oldest that reads opset 20 and blocks of INT4: what JetPack 6.2 brings.
OLDEST = {TENSORRT: (10, 3), TENSORRT_RTX: (1, 0)}


def library(engine: str) -> Any:
    """The Python module of an engine.

    Raises:
        EngineUnavailable: not installed, its shared libraries do not load, or it is too old; says what to install.
    """
    handled = sys.exc_info()[1]
    try:
        if engine == TENSORRT:
            import tensorrt as trt
        else:
            import tensorrt_rtx as trt
    except (ImportError, OSError) as error:  # OSError: the package is there, its shared library is not
        let_interrupt_pass(error, handled)
        on_a_jetson = "; on a Jetson it comes with JetPack (engines/jetson/setup.sh)" if engine == TENSORRT else ""
        raise EngineUnavailable(f'engine {engine} is not installed ({error}); pip install "agvas[{engine}]"{on_a_jetson}') from error
    found = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if found < OLDEST[engine]:
        oldest = ".".join(map(str, OLDEST[engine]))
        raise EngineUnavailable(f"engine {engine}: expected version {oldest} or newer, found {trt.__version__}; install a newer one")
    return trt


def version(engine: str) -> str:
    """The installed version; raises like `library`."""
    return str(library(engine).__version__)


def ahead_of_time(engine: str) -> tuple[str, ...]:
    """Compute capabilities ("8.9") that the installed library builds for without such a GPU; none of TensorRT's."""
    if engine != TENSORRT_RTX:
        return ()
    names = (name[2:] for name in library(engine).ComputeCapability.__members__ if name.startswith("SM"))
    return tuple(sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=lambda text: tuple(map(int, text.split(".")))))


def sm(capability: str) -> str:
    """ "8.9" as the libraries write it: "SM89"."""
    return f"SM{capability.replace('.', '')}"
