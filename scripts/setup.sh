#!/bin/sh
# Creates .venv, or reuses it, with Torchstone installed in editable form.
#
#   scripts/setup.sh          the package
#   scripts/setup.sh test     the package and what its tests and checks need
#
# TORCH_INDEX_URL   package index to take torch from; a torch wheel among pip's own find-links comes before it
# PYTHON            the interpreter to build .venv with; otherwise the first fitting one of python3, python3.11 and later
#
# Exit status: 0 done; 2 no usable Python, nothing written; else that of venv or pip.
set -eu
cd "$(dirname "$0")/.."

wanted=${1:-run}
case "$wanted" in
    run) target=. ;;
    test) target='.[test]' ;;
    *) echo "setup.sh: no set '$wanted'; allowed: run, test" >&2; exit 2 ;;
esac

# The stamp's three lines say what .venv holds: the set, the requirements, and the folder (a moved .venv is broken).
stamp=.venv/.torchstone
unfinished=.venv/.torchstone-unfinished
requirements=$(cat pyproject.toml constraints.txt | cksum)
folder=$(pwd)

line() { # line N of the stamp
    if [ -f "$stamp" ]; then sed -n "$1p" "$stamp"; fi
}

at_least_311() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

usable=no
if [ -f .venv/pyvenv.cfg ] && [ ! -f "$unfinished" ] && at_least_311 .venv/bin/python; then
    if [ ! -f "$stamp" ] || [ "$(line 3)" = "$folder" ]; then usable=yes; fi
fi
if [ $usable = yes ] && [ "$(line 2)" = "$requirements" ]; then
    case "$(line 1)" in
        test | "$wanted") exit 0 ;; # `test` includes `run`
    esac
fi

# A kill while packages are being written leaves half of one that pip takes for whole, so the mark stays until the end
# and the next call starts afresh. A failing pip (no network, no such version) undoes its own work and clears the mark.
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [ $usable = no ]; then
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.11 python3.12 python3.13 python3.14
    fi
    python='' without_venv='' too_old=''
    for candidate; do
        if ! version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
            continue
        elif ! at_least_311 "$candidate"; then
            too_old=${too_old:-$version}
        elif ! "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            without_venv=${without_venv:-$candidate}
        else
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ] && [ -n "$without_venv" ]; then
        echo "$without_venv has no venv module; on Debian or Ubuntu: sudo apt install ${without_venv##*/}-venv" >&2
        exit 2
    elif [ -z "$python" ]; then
        echo "Torchstone needs Python 3.11 or later and found ${too_old:-none};" \
            "on Debian or Ubuntu: sudo apt install python3 python3-venv" >&2
        exit 2
    fi
    echo "setting up .venv with $python, once; torch is a large download"
    rm -rf .venv
    mkdir .venv
    : >"$unfinished"
    "$python" -m venv .venv
fi

rm -f "$stamp"
: >"$unfinished"
quiet=
[ -t 1 ] || quiet=-q

# Without --no-compile most of the time goes into bytecode of modules that are never imported.
pip_install() {
    code=0
    .venv/bin/python -m pip --disable-pip-version-check $quiet install --no-compile -c constraints.txt "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        [ "$code" -ge 128 ] || rm -f "$unfinished"
        exit "$code"
    fi
}

if [ -z "${TORCH_INDEX_URL:-}" ]; then
    pip_install torch
    pip_install -e "$target"
elif .venv/bin/python -m pip -q install --no-index --no-deps -c constraints.txt torch >/dev/null 2>&1; then
    pip_install -e "$target" # torch came from pip's find-links, or was there
else
    # Torch alone comes from that index. What torch needs comes from wherever pip looks otherwise, and from that index
    # where it stands nowhere else (builds for some accelerators).
    pip_install --index-url "$TORCH_INDEX_URL" --no-deps torch
    pip_install --extra-index-url "$TORCH_INDEX_URL" -e "$target"
fi

printf '%s\n' "$wanted" "$requirements" "$folder" >"$stamp.new"
mv "$stamp.new" "$stamp"
rm -f "$unfinished"
