#!/usr/bin/env bash
# Sets a Jetson Orin with JetPack 6.2 up to build, verify and run bundles: a Python 3.10 environment over the system's own TensorRT 10.3.
#
#     engines/jetson/setup.sh [FOLDER]        # the environment's folder; default .venv in this checkout
#
# Nothing is installed into the system and nothing runs as root: what is missing there is told with the command that brings it. TensorRT
# is JetPack's, since no package index has it for this GPU; torch, transformers and onnx are not needed.
# Written after NVIDIA's documentation; not yet run on a Jetson.
set -euo pipefail

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
environment="${1:-$checkout/.venv}"

stop() {
    echo "setup.sh: $*" >&2
    exit 1
}

[ "$(uname -m)" = aarch64 ] || stop "expected a Jetson (aarch64), found $(uname -m); on a PC: pip install \"agvas[tensorrt-rtx]\""
release="$(head -n 1 "${AGVAS_TEGRA_RELEASE:-/etc/nv_tegra_release}" 2>/dev/null || true)"
case "$release" in
    "# R36 "*) ;;
    "") stop "expected Jetson Linux (a release file in the system's configuration), found none; flash JetPack 6.2" ;;
    *) stop "expected Jetson Linux R36 (JetPack 6), found: $release; flash JetPack 6.2" ;;
esac

python="$(command -v python3.10 || true)"
[ -n "$python" ] || stop "expected python3.10, found none; sudo apt install python3.10 python3.10-venv"
"$python" -c "import ensurepip" 2>/dev/null || stop "expected Python's venv module, found none; sudo apt install python3.10-venv"
found="$("$python" -c 'import tensorrt; print(tensorrt.__version__)' 2>/dev/null || true)"
[ -n "$found" ] || stop "expected JetPack's TensorRT for Python, found none; sudo apt install nvidia-jetpack python3-libnvinfer"
"$python" - "$found" <<'CHECK' || stop "expected TensorRT 10.3 or newer, found $found; sudo apt install nvidia-jetpack"
import sys
sys.exit(tuple(int(part) for part in sys.argv[1].split(".")[:2]) < (10, 3))
CHECK

# The system's packages stay visible, since TensorRT's Python module lies there. CUDA 12's bindings: JetPack 6 has CUDA 12.6.
"$python" -m venv --system-site-packages "$environment"
"$environment/bin/python" -m pip install --quiet --upgrade pip
"$environment/bin/python" -m pip install --quiet "$checkout[cuda]" "cuda-bindings>=12.6,<13"
capability="$("$environment/bin/python" -c 'from engines.cuda import capability_here; print(capability_here("cuda:0"))')"

cat <<DONE
TensorRT $found, compute capability $capability. Copy a bundle here (agvas-export makes it elsewhere), then:

    sudo nvpmodel -m 0 && sudo jetson_clocks        # full power, before anything is measured
    $environment/bin/agvas-build --bundle BUNDLE --engine tensorrt
    $environment/bin/agvas-segment PICTURE --bundle BUNDLE --engine tensorrt --device cuda:0
DONE
