#!/bin/sh
# Runs all GPU tests of a build folder, on a machine that may have nothing but the driver and CUDA:
#   gpu-test.sh BUILD_DIR [OUT_DIR]
# A build made with EPD_BUNDLE=ON brings the other libraries in BUILD_DIR/bundle. Logs and one JSON line per test go
# into OUT_DIR (default: BUILD_DIR/gpu-test). The table comes last; the exit code is 0 if nothing failed.
set -u

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: $0 BUILD_DIR [OUT_DIR]" >&2
    exit 2
fi
build=$(cd "$1" && pwd) || exit 2
out=${2:-$build/gpu-test}
mkdir -p "$out" || exit 2
: > "$out/results.jsonl"
if [ -d "$build/bundle" ]; then
    LD_LIBRARY_PATH=$build/bundle${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export LD_LIBRARY_PATH
fi
CUDA_MODULE_LOADING=EAGER
NCCL_NVLS_ENABLE=0
export CUDA_MODULE_LOADING NCCL_NVLS_ENABLE
table=
n_failed=0

# run NAME LIMIT_S COMMAND...
run() {
    name=$1 limit=$2
    shift 2
    if [ ! -x "$1" ]; then
        return # not in this build
    fi
    begin=$(date +%s)
    timeout -s KILL "$limit" "$@" > "$out/$name.log" 2>&1
    code=$?
    seconds=$(($(date +%s) - begin))
    case $code in
    0) word=ok ;;
    77) word=skipped ;;
    137) word=timeout n_failed=$((n_failed + 1)) ;;
    *) word=FAILED n_failed=$((n_failed + 1)) ;;
    esac
    printf '{"test":"%s","result":"%s","code":%d,"seconds":%d}\n' "$name" "$word" "$code" "$seconds" >> "$out/results.jsonl"
    table="$table$(printf '%-22s %-8s %4d s' "$name" "$word" "$seconds")
"
    if [ "$word" = FAILED ] || [ "$word" = timeout ]; then
        tail -n 15 "$out/$name.log" | cut -c1-300
    fi
}

tests=$build/tests/gpu
run kernels_exchange 300 "$tests/exchange/exchange_test" test
run kernels_gemm 300 "$tests/gemm/gemm_test" sm90
run kernels_gemm_limits 300 "$tests/gemm/limits_test"
run backend_exchange 300 "$tests/backend/test_gpu_exchange"
run backend_moe 300 "$tests/backend/test_gpu_moe"
run backend_process 120 "$tests/backend/test_gpu_process" "$build/daemon/epd"

# The same clients with the daemon and all of them in one MPS server.
if command -v nvidia-cuda-mps-control > /dev/null 2>&1; then
    mps=$(mktemp -d)
    CUDA_MPS_PIPE_DIRECTORY=$mps CUDA_MPS_LOG_DIRECTORY=$mps nvidia-cuda-mps-control -d > "$out/mps.log" 2>&1 &&
        CUDA_MPS_PIPE_DIRECTORY=$mps run backend_process_mps 120 "$tests/backend/test_gpu_process" "$build/daemon/epd"
    echo quit | CUDA_MPS_PIPE_DIRECTORY=$mps nvidia-cuda-mps-control >> "$out/mps.log" 2>&1
    rm -rf "$mps"
fi
if command -v compute-sanitizer > /dev/null 2>&1 && [ "${EPD_SANITIZER:-1}" = 1 ]; then
    sanitizer=$(command -v compute-sanitizer)
    [ -x "$tests/backend/test_gpu_exchange" ] &&
        run memcheck_exchange 300 "$sanitizer" --error-exitcode 9 --tool memcheck "$tests/backend/test_gpu_exchange"
    [ -x "$tests/gemm/gemm_test" ] &&
        run memcheck_gemm 300 "$sanitizer" --error-exitcode 9 --tool memcheck "$tests/gemm/gemm_test" sm90 0 8
    [ -x "$tests/exchange/exchange_test" ] &&
        run racecheck_kernels 300 "$sanitizer" --error-exitcode 9 --tool racecheck "$tests/exchange/exchange_test" test few staged
fi

printf '%s' "$table"
echo "$n_failed failed"
[ "$n_failed" -eq 0 ]
