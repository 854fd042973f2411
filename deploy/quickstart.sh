#!/bin/bash
# From a fresh Debian machine to a training run through epd: installs what is missing, builds, starts a daemon on the
# best backend that the machine has, lets rank processes train a small MoE language model through it, trains the same model without it,
# compares, shows the daemon's statistics, and stops everything.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
# shellcheck source=lib.sh
. "$here/lib.sh"

text=/usr/share/common-licenses/GPL-3
ranks=4
steps=200
backend=auto # CUDA where it can run, and then the layer computes in bf16; else the host
build=$root/build

usage() {
    cat <<END
usage: deploy/quickstart.sh [options]

  --text FILE     text to learn ($text)
  --ranks N       rank processes ($ranks)
  --steps N       training steps ($steps)
  --backend NAME  of the daemon: auto, host or cuda ($backend: cuda where it can run)
  --build DIR     build folder ($build)
  --help          this text

Without root or password-less sudo it names missing packages and stops. Nothing is installed outside the package manager;
sockets and logs live in a temporary folder.
END
}

while [ $# -gt 0 ]; do
    case $1 in
    --text | --ranks | --steps | --backend | --build)
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
[ -r "$text" ] || die "$text cannot be read; name another text with --text FILE"

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

# shellcheck disable=SC2086 # lists of names
install_packages $epd_build_packages

say "building in $build"
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEPD_TESTS=OFF >"$work/cmake.log" 2>&1 || {
    cat "$work/cmake.log" >&2
    die "cmake failed"
}
ninja -C "$build" --quiet epd epdctl epd-train-moe

epd=$build/daemon/epd
epdctl=$build/client/epdctl/epdctl
train=$build/client/examples/train_moe/epd-train-moe
export EPD_SOCKET=$work/epd.sock EPD_CONTROL_SOCKET=$work/epd-control.sock

say "starting epd, backend $backend"
"$epd" --backend "$backend" --socket "$EPD_SOCKET" --control-socket "$EPD_CONTROL_SOCKET" >"$work/log" 2>&1 &
daemon=$!
for _ in $(seq 100); do
    "$epdctl" status >"$work/status" 2>/dev/null && break
    kill -0 "$daemon" 2>/dev/null || die "epd ended at once"
    sleep 0.1
done
[ -s "$work/status" ] || die "epd does not answer at $EPD_CONTROL_SOCKET"
head -n 1 "$work/status"
grep -i 'backend' "$work/log" | tail -n 3 | cut -d' ' -f2-

say "training on $text: first through epd, then the same without it"
"$train" --ranks "$ranks" --experts $((2 * ranks)) --steps "$steps" --text "$text" --reference

say "what the daemon says: epdctl stats"
"$epdctl" stats

say "stopping"
kill "$daemon"
wait "$daemon" || die "epd ended with exit code $?"
daemon=
echo "done"
