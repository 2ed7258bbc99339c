"""Builds the native libraries in a checkout, for developers and for tests.

    python native/build.py                 the patched library, in build/dev/lib (zoomr_local finds it there)
    python native/build.py --stock         also the same source without the patch, in build/dev/stock,
                                           and in build/dev/stock/models the vocabularies that tests use
    python native/build.py --only-stock    the latter alone

Needs CMake 3.21; uses Ninja if it is there. CMAKE_ARGS is passed on, as in `pip install`.
`CMAKE_ARGS=-DZOOMR_STOCK=ON pip install .` leaves the stock library in build/<tag>/stock in the same way.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, patched: bool, stock: bool, extra: list[str]) -> int:
    cmake = shutil.which("cmake")
    if not cmake:
        print("CMake is missing: pip install cmake ninja", file=sys.stderr)
        return 1
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release",
                 f"-DPython_EXECUTABLE={sys.executable}", *extra]
    if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja"]
    if stock:
        configure.append("-DZOOMR_STOCK=ON")
    targets = ["zoomr"] * patched + ["llama-stock"] * stock
    compile_ = [cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1), "--target", *targets]
    for command in (configure, compile_):
        done = subprocess.run(command)
        if done.returncode != 0:
            return done.returncode
    if patched:
        print(folder / "lib")
    if stock:
        print(folder / "stock")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="build the native libraries")
    parser.add_argument("--stock", action="store_true", help="also build the unpatched library")
    parser.add_argument("--only-stock", action="store_true", help="build the unpatched library alone")
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "dev", help="build folder (default: build/dev)")
    args = parser.parse_args()
    extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    return build(args.dir.resolve(), not args.only_stock, args.stock or args.only_stock, extra)


if __name__ == "__main__":
    sys.exit(main())
