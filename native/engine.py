"""Fetches, unpacks and patches the engine's source; CMakeLists.txt runs it at configure time.

    python native/engine.py prepare --work DIR [--local DIR] [--pristine]

prints one line: the directory of a llama.cpp source tree, patched unless ``--pristine``. Everything is
done at most once for the same pin and patch, so that a rebuild stays incremental. Needs nothing but
Python and pip: neither git nor patch, which a user's machine may lack.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN_FILE = HERE / "engine.txt"
PATCH_FILE = HERE / "zoomr.patch"

# what the two libraries are built from; tools, tests, examples and the web UI stay packed
WANTED = ("CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "src", "vendor")
# vocabularies without weights, and chat templates: the tests' alone, so unpacked beside the unpatched source only
TEST_DATA = ("models",)


class EngineSourceError(Exception):
    """The source could not be fetched or patched; the message says what to do next."""


def pin() -> tuple[str, str]:
    """(version, sha256) of the pinned source distribution."""
    match = re.search(r"^llama-cpp-python==(\S+) --hash=sha256:([0-9a-f]{64})$", PIN_FILE.read_text(), re.M)
    if not match:
        raise EngineSourceError(f"{PIN_FILE} holds no 'llama-cpp-python==VERSION --hash=sha256:...' line")
    return match.group(1), match.group(2)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(folder: Path) -> Path:
    """The pinned source distribution, from the index that pip is configured for."""
    version, digest = pin()
    for name in (f"llama_cpp_python-{version}.tar.gz", f"llama-cpp-python-{version}.tar.gz"):
        if (folder / name).is_file() and sha256(folder / name) == digest:
            return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    # --no-build-isolation: pip reads the archive's metadata with the scikit-build-core that runs this build
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
               "--no-build-isolation", "--require-hashes", "-r", str(PIN_FILE), "-d", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = sorted(folder.glob("llama*.tar.gz"))  # with those of earlier pins
    if done.returncode != 0 or not found:
        raise EngineSourceError(
            f"pip could not download llama-cpp-python {version} (sha256 {digest[:12]}...):\n{done.stdout.strip()}\n"
            "Without a network, unpack that source distribution yourself and build with\n"
            "  CMAKE_ARGS=-DZOOMR_LLAMA_CPP_DIR=/path/to/llama_cpp_python/vendor/llama.cpp pip install .")
    pinned = next((archive for archive in found if sha256(archive) == digest), None)
    if pinned is None:
        raise EngineSourceError(f"{found[-1]} does not have the sha256 that {PIN_FILE} pins; delete it and try again")
    return pinned


def unpack(archive: Path, target: Path, wanted: tuple[str, ...] = WANTED) -> None:
    """What is ``wanted`` of vendor/llama.cpp in the archive into ``target``, which must not exist."""
    parent = target.with_name(target.name + ".part")
    shutil.rmtree(parent, ignore_errors=True)
    with tarfile.open(archive) as tar:
        top = tar.getnames()[0].split("/")[0]
        prefix = f"{top}/vendor/llama.cpp/"
        members = [m for m in tar.getmembers()
                   if m.name.startswith(prefix) and m.name[len(prefix):].split("/")[0] in wanted]
        if not members:
            raise EngineSourceError(f"{archive} holds no vendor/llama.cpp")
        for m in members:
            m.name = m.name[len(prefix):]
        # the archive is the pinned one; the filter still keeps links and paths inside the target
        extra = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(parent, members=members, **extra)
    parent.rename(target)


def copy_local(source: Path, target: Path, wanted: tuple[str, ...] = WANTED) -> None:
    """What is ``wanted`` of a local llama.cpp tree, modification times kept so that a rebuild is incremental."""
    if not (source / "src" / "llama-graph.cpp").is_file():
        raise EngineSourceError(f"ZOOMR_LLAMA_CPP_DIR={source} is no llama.cpp source directory (no src/llama-graph.cpp)")
    target.mkdir(parents=True)
    for name in wanted:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, target / name)
        elif path.is_file():
            shutil.copy2(path, target / name)


def parse_patch(text: str) -> dict[str, list[tuple[int, list[str], list[str]]]]:
    """file -> [(line number, old lines, new lines)] of a unified diff made by git."""
    files: dict[str, list[tuple[int, list[str], list[str]]]] = {}
    hunks: list[tuple[int, list[str], list[str]]] = []
    for line in text.splitlines():
        if line.startswith("+++ b/"):
            hunks = files.setdefault(line[6:], [])
        elif line.startswith("@@"):
            hunks.append((int(re.match(r"@@ -(\d+)", line).group(1)), [], []))
        elif line.startswith(("diff ", "index ", "--- ")) or not hunks:
            continue
        else:
            mark, body = line[:1] or " ", line[1:]
            if mark in " -":
                hunks[-1][1].append(body)
            if mark in " +":
                hunks[-1][2].append(body)
    return files


def find_block(lines: list[str], block: list[str], near: int) -> int | None:
    """Index of the place nearest to ``near`` where ``block`` stands in ``lines``, word for word."""
    hits = [i for i in range(len(lines) - len(block) + 1) if lines[i:i + len(block)] == block]
    return min(hits, key=lambda i: abs(i - near)) if hits else None


def apply_patch(tree: Path, patch: Path = PATCH_FILE) -> int:
    """Applies every hunk that is not there yet, all or nothing; returns how many were applied."""
    out: dict[Path, list[str]] = {}
    failed: list[str] = []
    applied = 0
    for name, hunks in parse_patch(patch.read_text()).items():
        path = tree / name
        lines = path.read_text().split("\n") if path.is_file() else []
        for near, old, new in hunks:
            if find_block(lines, new, near - 1) is not None:
                continue  # applied before
            at = find_block(lines, old, near - 1)
            if at is None:
                failed.append(f"{name}:{near}")
                continue
            lines[at:at + len(old)] = new
            out[path] = lines
            applied += 1
    if failed:
        version, _ = pin()
        raise EngineSourceError(
            f"{patch.name} does not apply to {tree}: no place for {', '.join(failed)}.\n"
            f"The patch was made for llama-cpp-python {version}; this source is another version.\n"
            f"Build the pinned one (unset ZOOMR_LLAMA_CPP_DIR; rm -rf {tree}), or remake the patch:\n"
            "native/README.md, 'Engine bump', has the commands.")
    for path, lines in out.items():
        # the newer of source and patch: unchanged inputs give unchanged times, so ninja rebuilds nothing
        stamp = max(path.stat().st_mtime, patch.stat().st_mtime)
        path.write_text("\n".join(lines))
        os.utime(path, (stamp, stamp))
    return applied


def is_patched(tree: Path) -> bool:
    path = tree / "src" / "llama-graph.cpp"
    return path.is_file() and "zoomr_graph_build" in path.read_text()


def patched_files(tree: Path, patch: Path = PATCH_FILE) -> dict[Path, tuple[bytes, int]]:
    """Contents and modification times (ns) of the files that the patch changes, as far as they are there."""
    paths = [tree / name for name in parse_patch(patch.read_text())]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths if path.is_file()}


def keep_times(before: dict[Path, tuple[bytes, int]]) -> None:
    """Files that are what they were get the time they had: a new hunk rebuilds its own file, not all that include another's."""
    for path, (content, stamp) in before.items():
        if path.is_file() and path.read_bytes() == content:
            os.utime(path, ns=(stamp, stamp))


def prepare(work: Path, local: Path | None = None, pristine: bool = False) -> Path:
    """The source tree to build from, below ``work`` (or ``local`` itself if that is patched already)."""
    if local is not None:
        if not pristine and is_patched(local):
            apply_patch(local)  # fails, naming the hunks, if it was patched with another patch
            return local
        if pristine and is_patched(local):
            raise EngineSourceError(f"{local} is patched: a stock build needs an unpatched source")
    version, digest = pin()
    origin = f"local {local}" if local else f"{version} {digest}"
    tree = work / ("pristine" if pristine else "source")
    mark = tree / ".zoomr-origin"
    wanted = (*WANTED, *TEST_DATA) if pristine else WANTED
    want = f"{origin}\n{wanted}\n" + ("" if pristine else hashlib.sha256(PATCH_FILE.read_bytes()).hexdigest())
    if local or not mark.is_file() or mark.read_text() != want:
        before = patched_files(tree)
        shutil.rmtree(tree, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        if local:
            copy_local(local, tree, wanted)
        else:
            unpack(download(work / "download"), tree, wanted)
        if not pristine:
            apply_patch(tree)
            keep_times(before)
        mark.write_text(want)
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(description="fetch and patch the engine's source")
    parser.add_argument("command", choices=["prepare", "version"])
    parser.add_argument("--work", type=Path, help="where sources are kept")
    parser.add_argument("--local", type=Path, help="a llama.cpp source directory to use instead of the pinned one")
    parser.add_argument("--pristine", action="store_true", help="without the patch")
    args = parser.parse_args()
    try:
        if args.command == "version":
            print(pin()[0])
        else:
            print(prepare(args.work.resolve(), args.local.resolve() if args.local else None, args.pristine))
    except EngineSourceError as error:
        print(f"zoomr-local: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
