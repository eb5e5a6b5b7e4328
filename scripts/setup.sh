# shellcheck shell=bash
# Sourced by the other scripts: the virtual environment .venv with the pinned requirements, made once.
# $extra_requirements: one more requirements file, if set.
# Set NCA_TORCH_INDEX to PyTorch's CPU wheel index on a machine without a GPU to save several GB of CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Not from "$@": a sourced script without arguments of its own sees those of its caller.
requirements=(requirements.txt ${extra_requirements:+"$extra_requirements"})
stamp=$(cat "${requirements[@]}" | sha256sum | cut -c1-16)
if [ ! -e ".venv/.installed-$stamp" ]; then
  echo "setting up .venv (a few minutes, 2.3 GB)"
  python=$(command -v python3.11 || command -v python3)
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    { echo "error: Python 3.11 is needed, $python is another version; install it and run again" >&2; exit 2; }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  # torch first and by itself: with it in place nothing below asks the registry for another build.
  "${pip[@]}" ${NCA_TORCH_INDEX:+--index-url "$NCA_TORCH_INDEX"} "$(grep -m1 '^torch==' requirements.txt)"
  for file in "${requirements[@]}"; do "${pip[@]}" -r "$file"; done
  touch ".venv/.installed-$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
# Small models on shared cores: one thread a process is faster than two, and nothing is looked up on the network.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export HF_HUB_DISABLE_TELEMETRY=1
