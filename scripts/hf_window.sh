#!/usr/bin/env bash
# Runs the tests of the Hugging Face classes with another transformers than .venv's, by default the oldest that the `hf`
# extra allows. Its environment lies on top of .venv, so that nothing else is installed twice.
#
#   scripts/hf_window.sh [version] [environment]
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-5.0.0}
environment=${2:-.venv/hf-window-$version}
if [ ! -f "$environment/ready" ]; then
  .venv/bin/python -m venv "$environment"
  purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  below=$(.venv/bin/python -c "$purelib")
  echo "import site; site.addsitedir('$below')" > "$("$environment/bin/python" -c "$purelib")/below.pth"
  "$environment/bin/python" -m pip install --quiet --no-input --constraint <(grep '^torch==' constraints.txt) \
    "transformers==$version"
  touch "$environment/ready"
fi
"$environment/bin/python" -m pytest -p no:cacheprovider tests/interop/test_hf*.py
