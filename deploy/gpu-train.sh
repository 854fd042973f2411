#!/bin/sh
# Trains the example through a daemon on this machine's GPUs and compares with the host reference; for gpu-test.sh:
#   gpu-train.sh BUILD_DIR OUT_DIR
# Four runs: as many ranks as GPUs, more ranks than GPUs, and fp16 with and without a choice of experts, which is what decides how
# close the losses can be. Exit code 77 where there is no GPU.
set -eu

build=$1 out=$2
root=$(dirname "$0")/..
work=$(mktemp -d)
text=$work/text
# Long enough that 200 steps do not learn it by heart: then the losses are small and every difference is large beside them.
cat "$root"/*.md "$root"/client/*.[ch] "$root"/ep/*.[ch] "$root"/daemon/*.[ch] > "$text"
daemon=
stop() {
    [ -z "$daemon" ] || kill "$daemon" 2> /dev/null || true
    rm -rf "$work"
}
trap stop EXIT

n_gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU' || true)
if [ "$n_gpus" -eq 0 ]; then
    echo "SKIP: no GPU"
    exit 77
fi
EPD_SOCKET=$work/epd.sock
export EPD_SOCKET
"$build/daemon/epd" --backend cuda --socket "$EPD_SOCKET" --control-socket "$work/control.sock" > "$out/training-daemon.log" 2>&1 &
daemon=$!
train=$build/client/examples/train_moe/epd-train-moe
"$train" --text "$text" --ranks "$n_gpus" --experts $((2 * n_gpus)) --steps 200 --report 50 --reference --losses "$out/losses.txt"
"$train" --text "$text" --ranks $((2 * n_gpus)) --experts $((2 * n_gpus)) --steps 50 --report 50 --reference
"$train" --text "$text" --ranks "$n_gpus" --experts $((2 * n_gpus)) --dtype f16 --steps 50 --report 50 --reference
"$train" --text "$text" --ranks "$n_gpus" --experts $((2 * n_gpus)) --top-k $((2 * n_gpus)) --dtype f16 --steps 50 --report 50 --reference
kill "$daemon"
wait "$daemon"
daemon=
