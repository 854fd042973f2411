"""Runs pytest over this folder, or says why not and exits 77, which ctest counts as skipped. Any Python 3.6 or newer.

With --torch the tests that need PyTorch, else all the others; further arguments are pytest's.
"""

import importlib.util
import os
import sys

SKIPPED = 77


NEED_TORCH = ["test_torch.py"]


def missing(modules):
    if sys.version_info < (3, 10):  # noqa: UP036
        return "this is Python {}.{}, the package needs 3.10".format(*sys.version_info)
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        return "{} has no {}".format(sys.executable, " and no ".join(absent))
    if os.environ.get("EPD_SANITIZE"):
        return "libepd is built with a sanitizer ({}), a plain Python cannot load it".format(os.environ["EPD_SANITIZE"])
    return None


def main():
    arguments = sys.argv[1:]
    wants_torch = "--torch" in arguments
    reason = missing(["numpy", "pytest"] + (["torch"] if wants_torch else []))
    if reason:
        print("skipped: " + reason)
        return SKIPPED
    import pytest

    here = os.path.dirname(os.path.abspath(__file__))
    if wants_torch:
        arguments.remove("--torch")
        what = [os.path.join(here, name) for name in NEED_TORCH]
    else:
        what = [here] + ["--ignore=" + os.path.join(here, name) for name in NEED_TORCH]
    return pytest.main(["-p", "no:cacheprovider", "-q", "--durations=5"] + what + arguments)


if __name__ == "__main__":
    sys.exit(main())
