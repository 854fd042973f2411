#!/bin/bash
# From a fresh Debian machine to a training run through epd: installs what is missing, builds, starts a daemon on the
# best backend that the machine has, lets rank processes train a small MoE language model through it, trains the same model without it,
# compares, shows the daemon's statistics, and stops everything.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
# shellcheck source=lib.sh
. "$here/lib.sh"

debian_text=/usr/share/common-licenses/GPL-3
text=
ranks=
steps=200
backend=auto
build=$root/build
built=${EPD_BUILD_DIR:-}

usage() {
    cat <<END
usage: deploy/quickstart.sh [options]

  --text FILE     text to learn ($debian_text, else epd's own sources)
  --ranks N       rank processes (one per GPU; 4 on the host backend and on a single GPU)
  --steps N       training steps ($steps)
  --backend NAME  of the daemon: auto, host or cuda (auto: cuda where it can run, in bf16, else host, in fp32)
  --build DIR     folder to build in ($build)
  --built DIR     take the programs of this build folder or installation; nothing is installed or built (\$EPD_BUILD_DIR)
  --help          this text

Without root or password-less sudo it names missing packages and stops. Nothing is installed outside the package manager;
sockets and logs live in a temporary folder.
END
}

while [ $# -gt 0 ]; do
    case $1 in
    --text | --ranks | --steps | --backend | --build | --built)
        [ $# -ge 2 ] || die "$1 needs a value"
        printf -v "${1#--}" '%s' "$2"
        shift 2
        ;;
    --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
    esac
done

case $backend in
auto | host | cuda) ;;
*) die "--backend $backend: want auto, host or cuda" ;;
esac

work=$(mktemp -d "${TMPDIR:-/tmp}/epd-quickstart-XXXXXX")
daemon=
stop_all() {
    local code=$?
    if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
        kill "$daemon"
        wait "$daemon" || true
    fi
    if [ "$code" -ne 0 ] && [ -s "$work/log" ]; then
        printf '\nthe last lines of the daemon:\n' >&2
        tail -n 20 "$work/log" >&2
    fi
    rm -rf "$work"
    exit "$code"
}
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

choose_text() {
    [ -n "$text" ] || text=$debian_text
    if [ "$text" = "$debian_text" ] && [ ! -r "$text" ]; then
        text=$work/text
        cat "$root"/*.md "$root"/client/*.[ch] "$root"/daemon/*.[ch] >"$text"
    fi
    [ -r "$text" ] || die "$text cannot be read; name another text with --text FILE"
}

# Whether this machine has a GPU of NVIDIA.
has_gpu() {
    [ -e /dev/nvidiactl ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# The CUDA backend is compiled where there is nvcc: what a machine with GPUs would miss is said before, not after, building.
choose_compiler() {
    local nvcc=/usr/local/cuda/bin/nvcc
    if [ -z "${CUDACXX:-}" ] && ! command -v nvcc >/dev/null && [ -x "$nvcc" ]; then
        export CUDACXX=$nvcc
    fi
    if [ -n "${CUDACXX:-}" ] || command -v nvcc >/dev/null; then
        return 0
    fi
    [ "$backend" != cuda ] || die "--backend cuda: no nvcc on PATH, in /usr/local/cuda or in \$CUDACXX"
    ! has_gpu || echo "there is a GPU, but no nvcc on PATH, in /usr/local/cuda or in \$CUDACXX: building without CUDA" >&2
}

build_all() {
    local cuda=AUTO
    case $backend in
    host) cuda=OFF ;;
    cuda) cuda=ON ;;
    auto) has_gpu || cuda=OFF ;; # the kernels take minutes to compile
    esac
    [ $cuda = OFF ] || choose_compiler
    # shellcheck disable=SC2086 # lists of names
    install_packages $epd_build_packages
    say "building in $build$([ $cuda != OFF ] || [ "$backend" = host ] || echo ", without CUDA: there is no GPU")"
    cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEPD_TESTS=OFF -DEPD_CUDA=$cuda \
        >"$work/cmake.log" 2>&1 || {
        cat "$work/cmake.log" >&2
        die "cmake failed"
    }
    ninja -C "$build" --quiet epd epdctl epd-train-moe
}

# program NAME FOLDER: where it lies in an installation or, in this folder, in a build.
program() {
    local found=$build/bin/$1
    [ -x "$found" ] || found=$build/$2/$1
    [ -x "$found" ] || die "no $1 in $build/bin or $build/$2"
    echo "$found"
}

# status KEY: of the daemon's status document.
status() {
    "$epdctl" --json status | sed -n "s/^.*\"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" | head -n 1
}

# Says what the daemon runs on and why; as many ranks as that has GPUs, unless told otherwise.
take_backend() {
    local taken n_devices why
    taken=$(status backend)
    n_devices=$(status n_devices)
    why=$(sed -n 's/^.*backend host because //p' "$work/log" | tail -n 1)
    if [ "$backend" != auto ]; then
        why="as asked"
    elif [ "$taken" != host ]; then
        why="it can run here"
    fi
    echo "backend $taken, $n_devices devices: $why"
    if [ "$taken" = host ] && [ "$backend" = auto ] && has_gpu; then
        echo "this machine has a GPU that is not used" >&2
    fi
    [ -z "$ranks" ] || return 0
    ranks=4
    [ "$taken" = host ] || [ "$n_devices" -lt 2 ] || ranks=$n_devices
}

start_daemon() {
    "$epd" --backend "$backend" --socket "$EPD_SOCKET" --control-socket "$EPD_CONTROL_SOCKET" >"$work/log" 2>&1 &
    daemon=$!
    # On GPUs the worker loads its kernels first; epd takes requests only afterwards.
    for _ in $(seq 300); do
        [ -n "$(status backend 2>/dev/null)" ] && return
        kill -0 "$daemon" 2>/dev/null || die "epd ended at once"
        sleep 0.1
    done
    die "epd does not answer at $EPD_CONTROL_SOCKET"
}

choose_text
if [ -n "$built" ]; then
    [ -d "$built" ] || die "$built is no folder"
    build=$(cd "$built" && pwd)
    # The libraries of a folder that was built elsewhere and carried here.
    export LD_LIBRARY_PATH="$build/client:$build/lib:$build/bundle${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
else
    build_all
fi
epd=$(program epd daemon)
epdctl=$(program epdctl client/epdctl)
train=$(program epd-train-moe client/examples/train_moe)
export EPD_SOCKET=$work/epd.sock EPD_CONTROL_SOCKET=$work/epd-control.sock

say "starting epd, backend $backend"
start_daemon
"$epdctl" status | head -n 1
take_backend

say "training on $text: first through epd, then the same without it"
"$train" --ranks "$ranks" --experts $((2 * ranks)) --steps "$steps" --text "$text" --reference

say "what the daemon says: epdctl stats"
"$epdctl" stats

say "stopping"
kill "$daemon"
wait "$daemon" || die "epd ended with exit code $?"
daemon=
echo "done"
