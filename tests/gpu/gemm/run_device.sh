#!/bin/bash
# Runs the built test and benchmark where there is a GPU: run_device.sh FOLDER [what ...]
# what: check, bench OP [CASE], tune "ENV ENV .." OP CASE, sanitize FIRST LAST, peers [args of bench_peers.py]
set -u
folder=$1
shift
cublas=$(dirname "$(find / -name 'libcublasLt.so.13' -not -path '/proc/*' 2>/dev/null | head -1)")
export LD_LIBRARY_PATH=$cublas:${LD_LIBRARY_PATH:-}
case $1 in
check) timeout 200 "$folder/gemm_test" sm90; timeout 200 "$folder/gemm_test" cublaslt ;;
case) timeout 60 "$folder/gemm_test" "${@:2}" ;;
bench) timeout 300 "$folder/gemm_bench" sm90 "${@:2}" ;;
sanitize) timeout 400 compute-sanitizer --tool "${4:-memcheck}" "$folder/gemm_test" sm90 "$2" "$3" ;;
peers) shift; timeout 500 python3 "$(dirname "$0")/bench_peers.py" "$folder" "$@" ;;
esac
