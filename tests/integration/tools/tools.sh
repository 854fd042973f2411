#!/bin/bash
# tools.sh CASE EPD EPDCTL TRAIN BENCH TEXT: runs one case below against a daemon of its own.
set -euo pipefail

case_name=$1
epd=$2
epdctl=$3
train=$4
bench=$5
text=$6

work=$(mktemp -d "${TMPDIR:-/tmp}/epd-tools-XXXXXX")
daemon=
cleanup() {
    local code=$?
    [ -z "$daemon" ] || kill -KILL "$daemon" 2>/dev/null || true
    [ "$code" -eq 0 ] || tail -n 30 "$work"/log "$work"/out 2>/dev/null || true
    rm -rf "$work"
    exit "$code"
}
trap cleanup EXIT

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# says FILE TEXT: the file has a line with this text.
says() {
    grep -q -F -- "$2" "$1" || {
        cat "$1" >&2
        fail "'$2' is not in the output"
    }
}

# exits CODE COMMAND...: the command ends with this code; its output is in $work/out.
exits() {
    local wanted=$1 code=0
    shift
    "$@" >"$work/out" 2>&1 || code=$?
    [ "$code" -eq "$wanted" ] || {
        cat "$work/out" >&2
        fail "$(basename "$1") ${*:2}: exit code $code, want $wanted"
    }
}

start_daemon() {
    export EPD_SOCKET=$work/epd.sock EPD_CONTROL_SOCKET=$work/epd-control.sock
    "$epd" --backend host --devices 2 --socket "$EPD_SOCKET" --control-socket "$EPD_CONTROL_SOCKET" >"$work/log" 2>&1 &
    daemon=$!
    for _ in $(seq 300); do
        "$epdctl" status >/dev/null 2>&1 && return
        sleep 0.1
    done
    fail "the daemon does not answer"
}

stop_daemon() {
    local code=0
    kill "$daemon"
    wait "$daemon" || code=$?
    daemon=
    [ "$code" -eq 0 ] || fail "the daemon ended with exit code $code"
}

case_training() {
    start_daemon
    exits 0 "$train" --ranks 4 --steps 12 --tokens 64 --hidden 32 --ffn 48 --text "$text" --reference \
        --losses "$work/losses"
    says "$work/out" "the runs agree"
    [ "$(wc -l <"$work/losses")" -eq 12 ] || fail "not one line of losses per step"
    # Three experts of a token, one rank with all experts, an odd context: nothing of it is special.
    exits 0 "$train" --ranks 1 --steps 3 --tokens 33 --hidden 16 --ffn 24 --experts 5 --top-k 3 --context 3 \
        --text "$text" --reference
    exits 0 "$epdctl" --json stats
    says "$work/out" '"copied_bytes": 0'
    # In half precision the layer's tensors are converted on their way in and out.
    for dtype in bf16 f16; do
        exits 0 "$train" --ranks 2 --steps 30 --tokens 64 --hidden 32 --ffn 48 --dtype $dtype --text "$text" --reference
        says "$work/out" "the layer computes in ${dtype/#f/fp}"
        says "$work/out" "the runs agree"
    done
    # Where no token can choose another expert for a rounding, the losses are as close as the dtype.
    for dtype in bf16 f16; do
        exits 0 "$train" --ranks 2 --steps 60 --tokens 64 --experts 4 --top-k 4 --dtype $dtype --text "$text" --reference
        says "$work/out" "the runs agree"
        case $dtype in
        bf16) says "$work/out" "allowed 1.6e-02" ;;
        f16) says "$work/out" "allowed 2.0e-03" ;;
        esac
    done
    # A tolerance that nothing can meet turns into the exit code.
    exits 1 "$train" --ranks 2 --steps 8 --tokens 64 --hidden 32 --ffn 48 --text "$text" --reference --tolerance 1e-30
    stop_daemon
}

case_training_fails_when_a_rank_dies() {
    start_daemon
    "$train" --ranks 4 --steps 100000 --tokens 64 --hidden 32 --ffn 48 --text "$text" >"$work/out" 2>&1 &
    local launcher=$! rank code=0
    for _ in $(seq 300); do
        grep -q 'step    10' "$work/out" && break
        sleep 0.1
    done
    rank=$("$epdctl" clients | sed -n 's/.*train-moe rank 2 .* open  *\([0-9][0-9]*\) .*/\1/p')
    [ -n "$rank" ] || fail "epdctl clients does not show rank 2"
    kill -KILL "$rank"
    wait "$launcher" || code=$?
    [ "$code" -eq 1 ] || fail "exit code $code, want 1"
    says "$work/out" "epd-train-moe: rank"
    stop_daemon
}

# The worker is the daemon's only child. It is killed three times, each time until a step had to be repeated; the
# losses are those of a run that nothing happened to, to the last digit.
case_training_goes_on_after_the_worker_is_killed() {
    start_daemon
    local run=("$train" --ranks 4 --steps 1500 --tokens 64 --hidden 32 --ffn 48 --text "$text")
    exits 0 "${run[@]}" --losses "$work/undisturbed"
    "${run[@]}" --losses "$work/disturbed" >"$work/out" 2>&1 &
    local launcher=$! code=0 repeated=0
    for _ in $(seq 300); do
        grep -q 'step    10' "$work/out" && break
        sleep 0.1
    done
    for _ in $(seq 100); do
        pkill -KILL -P "$daemon" || true
        sleep 0.2
        repeated=$(grep -c 'repeating it' "$work/out" || true)
        [ "$repeated" -lt 3 ] && kill -0 "$launcher" 2>/dev/null || break
    done
    wait "$launcher" || code=$?
    [ "$code" -eq 0 ] || fail "exit code $code, want 0"
    [ "$repeated" -ge 3 ] || fail "only $repeated steps were interrupted"
    cmp "$work/undisturbed" "$work/disturbed" || fail "the losses differ from those of an undisturbed run"
    stop_daemon
}

# With what is built: packages and building are the machine's matter.
case_quickstart() {
    local quickstart build
    quickstart=$(dirname "$0")/../../../deploy/quickstart.sh
    build=$(dirname "$epd")/..
    exits 0 "$quickstart" --built "$build" --backend host --steps 3 --text "$text"
    says "$work/out" "backend host, "
    says "$work/out" "4 ranks, "
    says "$work/out" "the runs agree"
    says "$work/out" "where the time of a step went"
    exits 0 env EPD_BUILD_DIR="$build" "$quickstart" --backend host --steps 3 --ranks 2 --text "$text"
    says "$work/out" "2 ranks, "
    exits 1 "$quickstart" --built "$work" --backend host
    says "$work/out" "no epd in"
    exits 1 "$quickstart" --text "$work/nothing"
    says "$work/out" "cannot be read"
    exits 2 "$quickstart" --nonsense
}

case_epdctl_verbs() {
    start_daemon
    for verb in status stats clients groups plans devices dump version doctor; do
        exits 0 "$epdctl" "$verb"
        [ -s "$work/out" ] || fail "$verb says nothing"
    done
    for verb in status stats clients groups plans devices dump; do
        exits 0 "$epdctl" --json "$verb"
        says "$work/out" "\"verb\": \"$verb\""
    done
    exits 0 "$train" --ranks 2 --steps 100 --tokens 16 --hidden 16 --ffn 16 --text "$text"
    exits 0 "$epdctl" --json dump
    # Of every step: its time runs from before the lanes get it.
    awk -F'[:,]' '/"run_ns"/ { run = $2 + 0 }
        /"(route|dispatch|gemm|activation|combine|wgrad)": / && $2 + 0 > run { longer++ }
        END { exit longer > 0 }' "$work/out" || fail "a phase took longer than its step"
    [ "$(grep -c '"serial"' "$work/out")" -gt 2 ] || fail "the document does not have all steps"
    exits 0 "$epdctl" --json --last 2 dump
    [ "$(grep -c '"serial"' "$work/out")" -eq 2 ] || fail "--last is not of the document"
    exits 0 "$epdctl" --verbose status
    says "$work/out" "restart_healthy"
    exits 0 "$epdctl" devices
    says "$work/out" "host"
    exits 1 "$epdctl" evict 999999
    says "$work/out" "EPD_UNKNOWN_ID"
    exits 124 timeout 3 "$epdctl" --watch=1 stats
    [ "$(grep -c '^epd ' "$work/out")" -ge 2 ] || fail "--watch looked only once"
    exits 0 "$epdctl" drain
    local code=0
    wait "$daemon" || code=$?
    daemon=
    [ "$code" -eq 0 ] || fail "a drained daemon ended with exit code $code"
}

case_epdctl_exit_codes() {
    export EPD_CONTROL_SOCKET=$work/nobody.sock
    exits 3 "$epdctl" stats
    says "$work/out" "no daemon at $work/nobody.sock"
    exits 0 "$epdctl" version
    exits 2 "$epdctl"
    exits 2 "$epdctl" nonsense
    exits 2 "$epdctl" evict
    exits 2 "$epdctl" evict seven
    exits 2 "$epdctl" --watch=soon stats
    exits 0 "$epdctl" --help
}

case_bench() {
    exits 0 "$bench" --daemon "$epd" --backend host --ranks 2 --tokens 16 --hidden 32 --ffn 48 --experts 4 --iters 3 --warmup 1 --json
    for op in handoff_barrier handoff_grouped_gemm dispatch combine combine_weighted dispatch_bwd combine_bwd grouped_gemm \
        moe_forward moe_backward; do
        says "$work/out" "{\"op\": \"$op\""
    done
    says "$work/out" "ratio_to_one_process"
    for dtype in bf16 f16; do
        exits 0 "$bench" --daemon "$epd" --backend host --ranks 2 --tokens 16 --hidden 32 --ffn 48 --experts 4 --iters 2 --dtype $dtype \
            --op moe_forward,moe_backward
    done
    exits 0 "$bench" --daemon "$epd" --backend host --op sessions --sessions 50
    says "$work/out" "50 idle sessions"
    exits 0 "$bench" --daemon "$epd" --backend host --op peer_loss --rounds 2 --ranks 2 --json
    for time in told reclaim serve; do
        says "$work/out" "\"time\": \"$time\""
    done
    exits 0 "$bench" --daemon "$epd" --backend host --op dispatch --zipf 10 --topk 8 --iters 2
    exits 1 "$bench" --daemon "$epd" --backend host --op link --json
    says "$work/out" "needs the CUDA backend"
    says "$work/out" '"failed": "EPD_UNSUPPORTED"'
    exits 1 "$bench" --daemon "$epd" --backend host --op dispatch --experts 7 --json
    says "$work/out" '"failed": "EPD_INVALID_ARGUMENT"'
    exits 1 "$bench" --daemon "$epd" --backend host --case dsv3 --tokens 1000000 --op moe_forward
    says "$work/out" "choose smaller"
    # A signal ends it and its daemon, whether it waits for ranks or computes by itself.
    local bench_pid code=0
    TMPDIR=$work "$bench" --daemon "$epd" --backend host --op moe_forward --tokens 2048 --iters 100000 >"$work/out" 2>"$work/why" &
    bench_pid=$!
    for _ in $(seq 300); do
        [ -S "$(echo "$work"/epd-bench-*/epd.sock)" ] && break
        sleep 0.1
    done
    kill -TERM "$bench_pid"
    wait "$bench_pid" || code=$?
    [ "$code" -eq 1 ] || fail "an interrupted benchmark ended with exit code $code"
    says "$work/why" "interrupted"
    [ ! -e "$(echo "$work"/epd-bench-*)" ] || fail "an interrupted benchmark has left its daemon's folder"
    exits 2 "$bench" --case nonsense
    exits 2 "$bench" --op ''
    exits 2 "$bench" --suite node --op dispatch
    exits 2 "$bench" --nodes 2 --ranks 3 --op handoff
    exits 2 "$bench" --nodes 2 --op peer_loss
    exits 2 "$bench" --nodes 2 --backend cuda --devices 0
    exits 2 "$bench" --crossing static --op dispatch
    exits 2 "$bench" --crossing none --nodes 2 --op dispatch
    # How fast it was is no matter of a test: the exit code of planning that grows too fast is allowed with its words.
    local json
    for json in "" --json; do
        "$bench" --op plan-scale --tokens 16 --topk 4 --zipf 9 ${json:+"$json"} >"$work/out" 2>"$work/why" ||
            says "$work/why" "planning grows too fast"
        if [ "$json" ]; then
            says "$work/out" '"ranks_log_ranks_growth": 160.00'
        else
            says "$work/out" "ranks x log(ranks) grows 160 times"
        fi
    done
    exits 1 "$bench" --op plan-scale --tokens 16000000 --topk 32
    says "$work/out" "choose smaller"
    exits 2 "$bench" --op plan-scale,dispatch
    exits 2 "$bench" --op peer_loss --ranks 1
    exits 2 "$bench" --socket "$work/epd.sock" --backend host
    exits 1 "$bench" --daemon /nonexistent
    exits 1 "$bench" --daemon /bin/false
    says "$work/out" "ended by itself, exit status 1"
}

case_bench_nodes() {
    exits 0 "$bench" --daemon "$epd" --nodes 2 --ranks 2 --tokens 16 --hidden 32 --ffn 48 --experts 4 --iters 3 --json \
        --op handoff,dispatch,moe_backward
    says "$work/out" "\"nodes\": 2"
    says "$work/out" "agreement_mean_us"
    says "$work/out" "\"network_bytes\": "
    exits 0 "$bench" --daemon "$epd" --nodes 2 --ranks 2 --tokens 16 --hidden 32 --ffn 48 --experts 4 --iters 3 --json \
        --crossing static --op dispatch,moe_backward
    says "$work/out" "\"crossing\": \"static\""
    exits 0 "$bench" --daemon "$epd" --nodes 3 --experts 6 --op handoff --iters 3
    says "$work/out" "3 nodes, agreed in"
}

"case_$case_name"
