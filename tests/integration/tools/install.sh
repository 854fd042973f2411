#!/bin/bash
# install.sh BUILD SOURCE: installs the build to a folder, as a user would, and uses what lies there: programs, library by
# pkg-config and by CMake, units.
set -euo pipefail

build=$1
source=$2
work=$(mktemp -d "${TMPDIR:-/tmp}/epd-install-XXXXXX")
trap 'rm -rf "$work"' EXIT

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

prefix=$work/first
cmake --install "$build" --prefix "$prefix" >"$work/log" 2>&1 || {
    cat "$work/log"
    fail "cmake --install"
}
echo "# edited" >>"$prefix/etc/epd/epd.conf"
cmake --install "$build" --prefix "$prefix" >"$work/log" 2>&1
grep -q '^# edited' "$prefix/etc/epd/epd.conf" || fail "an edited configuration was overwritten"
grep -q "^ExecStart=$prefix/bin/epd --config $prefix/etc/epd/epd.conf" "$prefix/lib/systemd/system/epd.service" ||
    fail "epd.service does not start what was installed"
DESTDIR=$work/image cmake --install "$build" --prefix /usr >"$work/log" 2>&1
grep -q "^ExecStart=/usr/bin/epd --config /etc/epd/epd.conf" "$work/image/usr/lib/systemd/system/epd.service" ||
    fail "epd.service of an image names the image"

# The tree may be moved.
mv "$prefix" "$work/moved"
prefix=$work/moved
for program in epd epdctl epd-bench; do
    "$prefix/bin/$program" --version || fail "$program does not start"
done
"$prefix/bin/epd-train-moe" --help | head -n 1
"$prefix/bin/epd" --check-config --config "$prefix/etc/epd/epd.conf"

libdir=$(dirname "$(find "$prefix" -name epd.pc)")/..
export PKG_CONFIG_PATH=$libdir/pkgconfig
cp "$source/client/examples/c/minimal.c" "$work"
# shellcheck disable=SC2046 # flags
"${CC:-cc}" "$work/minimal.c" $(pkg-config --cflags --libs epd) -Wl,-rpath,"$libdir" -o "$work/by_pkg_config"
mkdir "$work/user"
cat >"$work/user/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.16)
project(user C)
find_package(epd 0.1 REQUIRED)
add_executable(by_cmake ../minimal.c)
target_link_libraries(by_cmake PRIVATE epd::epd)
END
cmake -S "$work/user" -B "$work/user/build" -DCMAKE_PREFIX_PATH="$prefix" >"$work/log" 2>&1 &&
    cmake --build "$work/user/build" >>"$work/log" 2>&1 || {
    cat "$work/log"
    fail "a program by find_package"
}

export EPD_SOCKET=$work/epd.sock
"$prefix/bin/epd" --backend host --socket "$EPD_SOCKET" --control-socket "$work/control.sock" 2>"$work/log" &
daemon=$!
trap 'kill -KILL $daemon 2>/dev/null || true; rm -rf "$work"' EXIT
"$work/by_pkg_config"
"$work/user/build/by_cmake"
kill "$daemon"
wait "$daemon" || fail "the daemon ended with exit code $?"
