#!/bin/bash
# Installs what the tests need, builds the tree in every way that has to work, runs all tests, and prints the count last:
# "N passed, N failed". Exit code 0 only if nothing failed.
#
#   bare    what the quickstart builds: without CUDA, groups across nodes and tests, nothing installed for them
#   gcc     everything with gcc, EPD_CUDA=OFF, all tests
#   asan    with AddressSanitizer and UndefinedBehaviorSanitizer, all tests
#   tsan    with ThreadSanitizer, the unit and integration tests but a few (it says which)
#   clang   everything with clang and -Werror, and the fuzzers over their seeds
#   cuda    EPD_CUDA=ON where nvcc is, the tests labelled gpu (they skip without a GPU)
#   format  clang-format of every tracked C file
#   header  the public header alone as C99 and as C++
#   shell   the scripts are valid shell
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
# shellcheck source=lib.sh
. "$here/lib.sh"

parts="format header shell bare gcc clang asan tsan cuda"
only=
jobs=$(nproc)

usage() {
    sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'
    printf '\nusage: deploy/test.sh [--only PART[,PART...]] [--jobs N] [--help]\n'
}

while [ $# -gt 0 ]; do
    case $1 in
    --only | --jobs)
        [ $# -ge 2 ] || die "$1 needs a value"
        printf -v "${1#--}" '%s' "${2//,/ }"
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
for part in ${only:-$parts}; do
    case " $parts " in *" $part "*) ;; *) die "unknown part '$part', want some of: $parts" ;; esac
done

n_passed=0
n_failed=0
n_skipped=0
failures=()

# check NAME COMMAND...: one check that is not a ctest run.
check() {
    local name=$1
    shift
    if "$@"; then
        n_passed=$((n_passed + 1))
    else
        n_failed=$((n_failed + 1))
        failures+=("$name")
        echo "FAILED: $name"
    fi
}

# configure_and_build PART CMAKE_OPTION...: into build-test-PART.
configure_and_build() {
    local build=$root/build-test-$1
    shift
    cmake -S "$root" -B "$build" -G Ninja -DEPD_FABRIC=ON "$@" >"$build.log" 2>&1 || {
        cat "$build.log"
        return 1
    }
    ninja -C "$build" -j "$jobs" -k 0 --quiet # what does build is tested
}

# count_report FILE: "passed failed skipped" of a JUnit report. A test that did not run is skipped only if it said so itself;
# one whose program is missing has failed, whatever the report's own totals say.
count_report() {
    awk '
        function settle() {
            if (status == "run") passed++
            else if (status == "notrun" && message ~ /^SKIP_/ || status == "disabled") skipped++
            else if (status != "") failed++
            status = ""
            message = ""
        }
        /<testcase / { settle(); status = $0; sub(/.* status="/, "", status); sub(/".*/, "", status) }
        /<skipped message="/ { message = $0; sub(/.*message="/, "", message); sub(/".*/, "", message) }
        END { settle(); print passed + 0, failed + 0, skipped + 0 }' "$1"
}

# run_ctest PART CTEST_OPTION...: counts its tests; a run that leaves no report is a failure.
run_ctest() {
    local part=$1 build=$root/build-test-$1
    local report=$build/junit.xml passed failed skipped code=0
    shift
    rm -f "$report"
    # Address space randomisation as wide as newer kernels have it is more than the sanitizers of gcc 12 can map around.
    setarch -R ctest --test-dir "$build" -j "$jobs" --output-on-failure --output-junit "$report" --no-tests=ignore "$@" ||
        code=$?
    if [ ! -s "$report" ]; then
        check "$part: ctest left no report (exit code $code)" false
        return
    fi
    read -r passed failed skipped < <(count_report "$report")
    n_passed=$((n_passed + passed))
    n_failed=$((n_failed + failed))
    n_skipped=$((n_skipped + skipped))
    [ "$failed" -eq 0 ] || failures+=("$part: $failed tests")
    if [ "$code" -ne 0 ] && [ "$failed" -eq 0 ]; then
        check "$part: ctest ended with exit code $code" false
    fi
}

part_bare() {
    check "bare: build" configure_and_build bare -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEPD_CUDA=OFF -DEPD_FABRIC=OFF \
        -DEPD_TESTS=OFF
}

part_gcc() {
    check "gcc: build" configure_and_build gcc -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEPD_CUDA=OFF
    run_ctest gcc
}

# gcc sees array bounds violated in code that its own instrumentation has made; the gcc part keeps the warning an error.
sanitizer_flags=-DCMAKE_C_FLAGS=-Wno-error=array-bounds

part_asan() {
    check "asan: build" configure_and_build asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEPD_CUDA=OFF \
        -DEPD_SANITIZE=address,undefined -DEPD_FAILPOINTS=ON "$sanitizer_flags"
    ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1 \
        UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 run_ctest asan
}

part_tsan() {
    check "tsan: build" configure_and_build tsan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEPD_CUDA=OFF -DEPD_SANITIZE=thread \
        "$sanitizer_flags"
    echo "NOTE: under ThreadSanitizer only the tests labelled unit and integration run, without those of single kernels, which"
    echo "      have one thread and take minutes there, of four nodes (two are run), and of a training whose worker is killed"
    echo "      again and again, which hardly gets on at that speed"
    TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 run_ctest tsan -L 'unit|integration' \
        -E '^kernels_|_on_4_nodes$|_after_the_worker_is_killed$'
}

part_clang() {
    check "clang: build" configure_and_build clang -DCMAKE_C_COMPILER=clang -DCMAKE_BUILD_TYPE=RelWithDebInfo \
        -DEPD_CUDA=OFF -DEPD_FUZZ=ON
    run_ctest clang -L fuzz
}

part_cuda() {
    local nvcc
    nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
    if [ -z "$nvcc" ]; then
        echo "****************************************************************************************"
        echo "* NO nvcc ON THIS MACHINE: the CUDA code was neither compiled nor tested by this run.  *"
        echo "****************************************************************************************"
        return
    fi
    check "cuda: build" configure_and_build cuda -DCMAKE_BUILD_TYPE=Release -DEPD_CUDA=ON \
        -DCMAKE_CUDA_COMPILER="$nvcc"
    run_ctest cuda -L gpu
}

# Names of the files of the tree that match a pattern: the tracked ones in a checkout, else all outside build folders.
tree_files() {
    (
        cd "$root" || exit 1
        if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
            git ls-files -- "$@"
        else
            for pattern in "$@"; do
                find . -name 'build*' -prune -o -name "$pattern" -type f -print
            done
        fi
    )
}

check_format() {
    (cd "$root" && tree_files '*.c' '*.h' | xargs -r clang-format --dry-run -Werror)
}

check_header_c() {
    "$1" -std=c99 -pedantic -Wall -Wextra -Werror -fsyntax-only -x c "$root/client/epd.h"
}

check_header_cxx() {
    "$1" -std=c++11 -pedantic -Wall -Wextra -Werror -fsyntax-only -x c++ "$root/client/epd.h"
}

check_shell() {
    local file code=0
    while read -r file; do
        bash -n "$root/$file" || code=1
    done < <(tree_files '*.sh'; echo .ci/run)
    return "$code"
}

part_format() {
    check "format" check_format
}

part_header() {
    check "header: C99, gcc" check_header_c gcc
    check "header: C++, g++" check_header_cxx g++
    check "header: C99, clang" check_header_c clang
    check "header: C++, clang++" check_header_cxx clang++
}

part_shell() {
    check "shell" check_shell
}

# One function, so that bash has read the whole file before a run of minutes begins.
main() {
    # shellcheck disable=SC2086 # lists of names
    install_packages $epd_build_packages $epd_fabric_packages $epd_test_packages

    for part in ${only:-$parts}; do
        say "$part"
        started=$SECONDS
        "part_$part"
        echo "$part took $((SECONDS - started)) s"
    done

    say "summary"
    for failure in "${failures[@]+"${failures[@]}"}"; do
        echo "failed: $failure"
    done
    [ "$n_skipped" -eq 0 ] || echo "$n_skipped skipped (no GPU, or not built here)"
    echo "$n_passed passed, $n_failed failed"
    [ "$n_failed" -eq 0 ]
    exit $?
}

main
