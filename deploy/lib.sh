# Shared by the scripts of this folder: messages and Debian packages. Sourced by bash; sets nothing but functions and the
# package lists.
# shellcheck shell=bash disable=SC2034

# What building and running epd takes.
epd_build_packages="build-essential cmake ninja-build pkg-config libuv1-dev libprotobuf-c-dev protobuf-c-compiler libinih-dev \
libjansson-dev libopenblas-dev"
# What groups across nodes take on top (EPD_FABRIC): rails between nodes, and the proof of the shared secret.
epd_fabric_packages="libucx-dev libsodium-dev"
# What the tests, the manuals and the other compiler take on top.
epd_test_packages="check scdoc clang clang-format libclang-rt-14-dev util-linux iproute2 python3 python3-numpy python3-pytest"

say() {
    printf '\n== %s\n' "$*"
}

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# missing_packages NAME...: those that are not installed.
missing_packages() {
    local name
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || echo "$name"
    done
}

# install_packages NAME...: by apt-get if we may, else names what is missing and ends. EPD_SKIP_PACKAGES=1 leaves it all to you.
install_packages() {
    local missing as_root=()
    [ "${EPD_SKIP_PACKAGES:-0}" = 1 ] && return 0
    if ! command -v dpkg-query >/dev/null; then
        die "no dpkg here: install what corresponds to these Debian packages and set EPD_SKIP_PACKAGES=1: $*"
    fi
    missing=$(missing_packages "$@" | tr '\n' ' ')
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            as_root=(sudo -n)
        else
            die "missing packages; as root: apt-get install $missing"
        fi
    fi
    say "installing: $missing"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    # shellcheck disable=SC2086 # a list of names
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
}
