#!/usr/bin/env bash
# Builds the torch extension of Transformer Engine, of which its makers publish the source only.
#
#   tools/build_te.sh PYTHON FOLDER
#
# PYTHON is that of an environment with requirements/te.txt and torch; the wheel comes into FOLDER.
# Needs a C++ compiler and the CUDA 13 toolkit (CUDA_HOME, or nvcc on the PATH), no GPU. Takes about
# 8 minutes on two cores. pybind11 must be what torch bundles, or the import crashes.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") folder=$2

if [ -z "${CUDA_HOME:-}" ] && command -v nvcc >/dev/null; then
    # What it says itself: on the PATH may be a script that calls it.
    CUDA_HOME=$(nvcc --dryrun -c -x cu /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
fi
if [ ! -x "${CUDA_HOME:-}/bin/nvcc" ]; then
    echo "no nvcc in CUDA_HOME=${CUDA_HOME:-}; set it to a CUDA 13 toolkit, or pass a built wheel as" \
        "make test-te TE_WHEEL=PATH" >&2
    exit 1
fi

# Headers that torch brought along, in wheels of their own; those of C++ come with the toolkit.
nvidia=$("$python" -c 'import nvidia; print(next(iter(nvidia.__path__)))')
CPATH=$nvidia/cu13/include:$nvidia/cudnn/include:$nvidia/nccl/include:$CUDA_HOME/include/cccl

PATH=$(dirname "$python"):$PATH  # ninja
export CUDA_HOME CPATH PATH
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-2}"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --require-hashes \
    --wheel-dir "$folder" --requirement "$here/requirements/te_torch.txt"
