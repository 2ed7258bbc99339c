"""The house of floors: a file imports only from floors below its own (or beside it on the same floor)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "zoomr_local"

FLOORS = (
    ("child_process", "clock", "config", "config_lines", "errors", "events", "files", "folders", "gguf_file", "grading", "hub_names", "machine", "sizes"),
    ("libllama", "tiers", "timeline", "session_files", "journal", "hub", "hub_cache", "trace_file", "trace_held", "trace_view"),
    ("policies", "dialects", "sampling", "schema", "thinking", "block_index", "kv_cache", "heads_cache", "cluster_cache", "calibrations", "chat_template", "model", "plan", "fit", "planner", "trial", "model_facts"),
    ("constraint", "reply", "generation", "session", "block_generation", "held_blocks", "turns", "beacon_generation", "heads_generation", "cluster_generation", "heads_setup", "engine_config", "engine"),
    ("calibrate", "conversation", "cache_view", "trace_record", "bench", "bench_case", "bench_depth", "bench_meter", "bench_report", "bench_state", "checkpoint", "doctor", "selftest", "problems", "problem_tables", "problem_input", "openai_batch", "template", "attempts", "votes", "math_grader", "tally", "solve", "workers", "evaluate", "evaluate_report"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of zoomr_local that a file names in its imports, also those inside functions."""
    rooms = set()
    package = ["zoomr_local", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *(node.module.split(".") if node.module else [])]
            full = [[*names, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name.split(".") for alias in node.names]
        else:
            continue
        rooms |= {parts[1] for parts in full if parts[0] == "zoomr_local" and len(parts) > 1 and parts[1] in FLOOR}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    room = room_of(path)
    assert room in FLOOR, f"give {room} a floor"
    above = {other for other in imported_rooms(path) if FLOOR[other] > FLOOR[room]}
    assert not above, f"{room} imports {sorted(above)} from a floor above"


def test_policies_are_pure():
    """A policy sees arrays and sizes only: it imports numpy and its own folder, never a model or a cache."""
    for path in FILES:
        if room_of(path) == "policies":
            assert imported_rooms(path) <= {"policies"}, path


def test_only_libllama_knows_c():
    for path in FILES:
        if room_of(path) != "libllama":
            names = {name.split(".")[0] for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, (ast.Import, ast.ImportFrom))
                     for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])}
            assert not names & {"ctypes", "llama_cpp"}, path
