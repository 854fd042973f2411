"""Runs pytest over this folder, or says why not and exits 77, which ctest counts as skipped. Any Python 3.6 or newer."""

import importlib.util
import os
import sys

SKIPPED = 77


def missing():
    if sys.version_info < (3, 10):  # noqa: UP036
        return "this is Python {}.{}, the package needs 3.10".format(*sys.version_info)
    absent = [name for name in ("numpy", "pytest") if importlib.util.find_spec(name) is None]
    if absent:
        return "{} has no {}".format(sys.executable, " and no ".join(absent))
    if os.environ.get("EPD_SANITIZE"):
        return "libepd is built with a sanitizer ({}), a plain Python cannot load it".format(os.environ["EPD_SANITIZE"])
    return None


def main():
    reason = missing()
    if reason:
        print("skipped: " + reason)
        return SKIPPED
    import pytest

    here = os.path.dirname(os.path.abspath(__file__))
    return pytest.main(["-p", "no:cacheprovider", "-q", "--durations=5", here] + sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
