#!/usr/bin/env bash
# Checks every kernel on a Hopper GPU (H100, H200) and measures kernels and sampler steps: one command, under 8 minutes.
#
#   benchmarks/gpu.sh [--only=REGEX] [--budget=SECONDS] [--output=FILE]
#
# Writes $OUT/gpu.json where OUT is set, else benchmarks/results/gpu.json, and the same folder's gpu.log. Exit code: 0; 1 where
# a kernel is wrong; 2 where the Python, a package or the GPU is missing. Needs no network and no installation: a Python with
# jax (0.10.2 or newer, with its CUDA plugin), flax and jaxtyping, and for the peer PyTorch. PYTHON names another one.
#
# On a remote machine with a copy of this tree and no .git, give the commit:
#
#   BENCHMARK_COMMIT=COMMIT benchmarks/gpu.sh
#
# COMMIT is the output of `git describe --always --dirty` in the repository. If a package is missing there, or too old, copy its
# wheel into .whl/ of the tree; the lines below put these wheels before the machine's packages. To get one, in the repository's root:
#
#   echo /.whl/ >> .git/info/exclude
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 -d .whl NAME==VERSION
set -u
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
out=${OUT:-benchmarks/results}
mkdir -p "$out"

# Mosaic and XLA call ptxas.
for cuda in "${CUDA_HOME:-}" /usr/local/cuda; do
    [ -n "$cuda" ] && [ -x "$cuda/bin/ptxas" ] && PATH="$PATH:$cuda/bin" && export CUDA_ROOT="${CUDA_ROOT:-$cuda}" && break
done
command -v ptxas >/dev/null || echo "gpu.sh: no ptxas in PATH or /usr/local/cuda/bin; the kernels may not compile" >&2

for python in ${PYTHON:+"$PYTHON"} python3 python .venv/bin/python; do
    command -v "$python" >/dev/null || continue
    if compgen -G '.whl/*.whl' >/dev/null; then
        site=$(mktemp -d)
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 2
        PYTHONPATH="$site:$PYTHONPATH"
    fi
    missing=$("$python" - <<'EOF'
import importlib.util
wanted = ("jax", "jaxlib", "flax", "jaxtyping", "numpy", "ml_dtypes")
print(*(name for name in wanted if importlib.util.find_spec(name) is None))
EOF
    ) && [ -z "$missing" ] && break
    echo "gpu.sh: $python misses ${missing:-everything}" >&2
    python=
done
[ -n "${python:-}" ] || { echo "gpu.sh: no Python with all that is needed" >&2; exit 2; }

set -o pipefail
"$python" -m benchmarks.gpu --output="$out/gpu.json" "$@" 2>&1 | tee "$out/gpu.log"
