#!/bin/sh
# Trains the quickstart recipe and reports on it. A second call continues an unfinished run; a finished one is only
# reported on. With STEPS the run is that many steps long and has a folder of its own.
set -eu
cd "$(dirname "$0")/.."

run=runs/quickstart
if [ -n "${STEPS:-}" ]; then
    run=runs/quickstart-$STEPS
    set -- "trainer.steps=$STEPS"
else
    set --
fi
if [ -e "$run" ]; then
    set -- "$@" --resume
fi
.venv/bin/torchstone train quickstart "$@" --out "$run"
.venv/bin/python examples/quickstart_report.py "$run"
