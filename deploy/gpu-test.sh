#!/bin/sh
# Runs all GPU tests and the benchmarks of a build folder, on a machine that may have nothing but the driver and CUDA:
#   gpu-test.sh BUILD_DIR [OUT_DIR]
# A build made with EPD_BUNDLE=ON brings the other libraries in BUILD_DIR/bundle. Into OUT_DIR (default: BUILD_DIR/gpu-test) go
# logs, results.jsonl with a line per test, bench*.jsonl and peers.jsonl with a line per measurement. The tables come last; the
# exit code is 0 if nothing failed.
#
# Environment: EPD_GPU_ONLY="NAME..." runs only these; EPD_SANITIZER=0 and EPD_BENCH=0 leave those out; EPD_BENCH_ITERS (10),
# EPD_BENCH_ROUNDS (20, killed ranks) and EPD_BENCH_CASES (all five) say how much is measured; EPD_GPU_LIMIT bounds the seconds
# that any one of them may take, below its own limit.
set -u

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 BUILD_DIR [OUT_DIR]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
build=$(cd "$1" && pwd) || exit 2
out=${2:-$build/gpu-test}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
: > "$out/results.jsonl"
if [ -d "$build/bundle" ]; then
    LD_LIBRARY_PATH=$build/bundle${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_LIBRARY_PATH
fi
LD_LIBRARY_PATH=$build/client${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
CUDA_MODULE_LOADING=EAGER
NCCL_NVLS_ENABLE=0
export LD_LIBRARY_PATH CUDA_MODULE_LOADING NCCL_NVLS_ENABLE
table=
n_failed=0

wanted() {
    [ -z "${EPD_GPU_ONLY:-}" ] && return 0
    case " $EPD_GPU_ONLY " in
    *" $1 "*) return 0 ;;
    esac
    return 1
}

# limit_of SECONDS: the lower of it and EPD_GPU_LIMIT.
limit_of() {
    if [ -n "${EPD_GPU_LIMIT:-}" ] && [ "$EPD_GPU_LIMIT" -lt "$1" ]; then
        echo "$EPD_GPU_LIMIT"
    else
        echo "$1"
    fi
}

# finish NAME CODE SECONDS: a line of the table.
finish() {
    case $2 in
    0) word=ok ;;
    77) word=skipped ;;
    137) word=timeout n_failed=$((n_failed + 1)) ;;
    *) word=FAILED n_failed=$((n_failed + 1)) ;;
    esac
    printf '{"test":"%s","result":"%s","code":%d,"seconds":%d}\n' "$1" "$word" "$2" "$3" >> "$out/results.jsonl"
    line=$(printf '%-22s %-8s %4d s' "$1" "$word" "$3")
    table="$table$line
"
    echo "$line" # as it comes: whoever is cut off has seen something
    if [ "$word" = FAILED ] || [ "$word" = timeout ]; then
        tail -n 15 "$out/$1.log" | cut -c1-300
    fi
}

missing() {
    printf '{"test":"%s","result":"not built"}\n' "$1" >> "$out/results.jsonl"
    table="$table$(printf '%-22s not built' "$1")
"
}

# starts NAME LIMIT_S PROGRAM...: whether it is wanted and there. Sets name, limit and begin.
starts() {
    name=$1 limit=$(limit_of "$2")
    wanted "$name" || return 1
    if [ ! -x "$3" ]; then
        missing "$name"
        return 1
    fi
    begin=$(date +%s)
}

# run NAME LIMIT_S COMMAND...: everything it prints goes into NAME.log.
run() {
    starts "$@" || return
    shift 2
    timeout -s KILL "$limit" "$@" > "$out/$name.log" 2>&1
    finish "$name" $? $(($(date +%s) - begin))
}

# measure NAME LIMIT_S COMMAND...: its JSON lines go into NAME.jsonl, the rest into NAME.log.
measure() {
    starts "$@" || return
    shift 2
    timeout -s KILL "$limit" "$@" > "$out/$name.jsonl" 2> "$out/$name.log"
    finish "$name" $? $(($(date +%s) - begin))
}

mps=
mps_start() {
    command -v nvidia-cuda-mps-control > /dev/null 2>&1 || return 1
    mps=$(mktemp -d)
    CUDA_MPS_PIPE_DIRECTORY=$mps CUDA_MPS_LOG_DIRECTORY=$mps
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    nvidia-cuda-mps-control -d >> "$out/mps.log" 2>&1
}
mps_stop() {
    [ -n "$mps" ] || return
    echo quit | nvidia-cuda-mps-control >> "$out/mps.log" 2>&1
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    rm -rf "$mps"
    mps=
}

tests=$build/tests/gpu
epd=$build/daemon/epd
bench=$build/client/bench/epd-bench
run kernels_exchange 300 "$tests/exchange/exchange_test" test
run kernels_hop 120 "$tests/exchange/hop_test"
run kernels_gemm 300 "$tests/gemm/gemm_test" sm90
run kernels_gemm_limits 300 "$tests/gemm/limits_test"
run kernels_gemm_repeat 60 "$tests/gemm/repeat_test"
run backend_exchange 300 "$tests/backend/test_gpu_exchange"
run backend_fused 90 "$tests/backend/test_gpu_fused"
run backend_moe 300 "$tests/backend/test_gpu_moe"
run backend_expert 300 "$tests/backend/test_gpu_expert"
for n in 2 4; do
    EPD_TEST_NODES=$n
    export EPD_TEST_NODES
    run "backend_exchange_$n" 120 "$tests/backend/test_gpu_exchange"
    run "backend_moe_$n" 120 "$tests/backend/test_gpu_moe"
    EPD_TEST_CROSSING=eager
    export EPD_TEST_CROSSING
    run "backend_exchange_${n}_eager" 120 "$tests/backend/test_gpu_exchange"
    run "backend_moe_${n}_eager" 120 "$tests/backend/test_gpu_moe"
    unset EPD_TEST_NODES EPD_TEST_CROSSING
done
run backend_hop 120 "$tests/backend/test_gpu_hop"
run backend_hop_eager 120 "$(command -v env)" EPD_TEST_CROSSING=eager "$tests/backend/test_gpu_hop"
run fabric_rail 60 "$tests/fabric/test_gpu_rail"
run fabric_nodes 180 "$tests/fabric/test_gpu_nodes" "$epd" "$build/client/epdctl/epdctl"
run fabric_nodes_eager 180 "$(command -v env)" EPD_TEST_CROSSING=eager "$tests/fabric/test_gpu_nodes" "$epd" \
    "$build/client/epdctl/epdctl"
run backend_process 120 "$tests/backend/test_gpu_process" "$epd"
run backend_local 120 "$tests/backend/test_gpu_local" "$epd"
run backend_recover 120 "$tests/backend/test_gpu_recover" "$epd"
run backend_reclaim 120 "$tests/backend/test_gpu_reclaim" "$epd" "$build/client/epdctl/epdctl"
fault=$tests/fault/test_gpu_fault
shim=$tests/fault/libgpu_fault_shim.so
for suite in ranks workers input memory; do
    run "fault_$suite" 90 "$fault" "$epd" "$shim" "$suite"
done
nvidia-smi -L 2> /dev/null | grep -q '^GPU' && run quickstart 120 "$root/deploy/quickstart.sh" --backend cuda --built "$build"
run training 180 "$root/deploy/gpu-train.sh" "$build" "$out"
if python3 -c 'import torch' > /dev/null 2>&1 && [ -e "$build/client/libepd.so" ]; then
    run torch 400 "$(command -v env)" -u CUDA_MODULE_LOADING EPD_BINARY="$epd" EPD_LIBRARY="$build/client/libepd.so" \
        PYTHONPATH="$root/client/python" PYTHONDONTWRITEBYTECODE=1 python3 "$root/tests/python/torch_gpu.py"
fi

# The same clients with the daemon and all of them in one MPS server.
if mps_start; then
    run backend_process_mps 120 "$tests/backend/test_gpu_process" "$epd"
    run backend_local_mps 120 "$tests/backend/test_gpu_local" "$epd"
    run fault_mps 60 "$fault" "$epd" "$shim" mps
    run fault_workers_mps 60 "$(command -v env)" EPD_TEST_ONLY=a_worker_killed "$fault" "$epd" "$shim" workers
    mps_stop
fi

if command -v compute-sanitizer > /dev/null 2>&1 && [ "${EPD_SANITIZER:-1}" = 1 ]; then
    sanitizer=$(command -v compute-sanitizer)
    [ -x "$tests/backend/test_gpu_exchange" ] &&
        run memcheck_exchange 300 "$sanitizer" --error-exitcode 9 --tool memcheck "$tests/backend/test_gpu_exchange"
    [ -x "$tests/backend/test_gpu_fused" ] &&
        run memcheck_fused 60 "$sanitizer" --error-exitcode 9 --tool memcheck "$tests/backend/test_gpu_fused"
    [ -x "$tests/gemm/gemm_test" ] &&
        run memcheck_gemm 300 "$sanitizer" --error-exitcode 9 --tool memcheck "$tests/gemm/gemm_test" sm90 0 8
    [ -x "$tests/exchange/exchange_test" ] &&
        run racecheck_kernels 300 "$sanitizer" --error-exitcode 9 --tool racecheck "$tests/exchange/exchange_test" test few staged
fi

# Benchmarks: the hand-off without MPS, then everything with it, then whatever else can do the same work here.
if [ "${EPD_BENCH:-1}" = 1 ] && [ -x "$bench" ] && ! [ -e /dev/nvidia0 ] && ! nvidia-smi -L > /dev/null 2>&1; then
    echo "no GPU here: nothing is measured"
elif [ "${EPD_BENCH:-1}" = 1 ] && [ -x "$bench" ]; then
    iters=${EPD_BENCH_ITERS:-10}
    cases=${EPD_BENCH_CASES:-dsv3,qwen235b,qwen30b,mixtral,decode128}
    measure bench_without_mps 60 "$bench" --daemon "$epd" --backend cuda --op handoff --iters "$iters" --json
    mps_start || echo "no MPS here: everything is measured without it"
    measure bench 400 "$bench" --daemon "$epd" --backend cuda --suite node --case "$cases" --iters "$iters" \
        --rounds "${EPD_BENCH_ROUNDS:-20}" --json
    if [ "$(nvidia-smi -L 2> /dev/null | grep -c '^GPU')" -ge 2 ]; then
        echo "bench_nodes: two daemons of this host, NCCL over sockets on the loopback: times are those of the sockets"
        measure bench_nodes 120 "$bench" --daemon "$epd" --backend cuda --nodes 2 --op handoff,dispatch,combine,moe_forward \
            --case decode128 --iters "$iters" --json
    fi
    mps_stop
    if python3 -c 'import torch' > /dev/null 2>&1 && [ -f "$root/tests/bench/peers/peers.py" ]; then
        unset CUDA_MODULE_LOADING
        measure peers 300 "$(command -v python3)" "$root/tests/bench/peers/peers.py" --case "$cases" --iters "$iters"
        [ -s "$out/bench.jsonl" ] && [ -s "$out/peers.jsonl" ] &&
            python3 "$root/tests/bench/peers/table.py" "$out/bench.jsonl" "$out/peers.jsonl" | tee "$out/table.txt"
    fi
fi

printf '%s' "$table"
echo "$n_failed failed"
if [ ! -s "$out/results.jsonl" ] || ! grep -q '"result":"ok"' "$out/results.jsonl"; then
    [ "$n_failed" -eq 0 ] && echo "nothing was run: no GPU, nothing built, or no such name in EPD_GPU_ONLY" && exit 77
fi
[ "$n_failed" -eq 0 ]
