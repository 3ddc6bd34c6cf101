#!/bin/sh
# Builds model_store/NAME.mar; ./archive.sh --help tells the rest.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || { echo "archive.sh: python3 is missing" >&2; exit 1; }
"$python" -c "
from importlib.util import find_spec
assert all(map(find_spec, ('torch', 'torchvision', 'model_archiver', 'torchserve_explain')))" 2>/dev/null || {
    echo "archive.sh: $python lacks the requirements; run 'make setup' first" >&2; exit 1; }
exec "$python" -m torchserve_explain archive "$@"
