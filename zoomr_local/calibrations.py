"""Where a model's calibration is: beside its file, or in the user's data folder where that cannot be written.

What stands in one is `policies/heads/calibration.py`'s; `calibrate.py` measures it. A calibration belongs to the bytes of a
model file, whatever its name.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from .errors import ModelError, UsageError
from .files import write_atomically
from .folders import user_folder
from .journal import model_fingerprint
from .policies.heads.calibration import FORMAT, Calibration, from_json, to_json

SUFFIX = ".calibration.json"
_MOST_BYTES = 1 << 20  # of a file that could be one


def fingerprint(model: Path) -> dict[str, Any]:
    """What a calibration says of its model: size and hash. Raises ModelError for a file that cannot be read."""
    try:
        found = model_fingerprint(model)
    except OSError as error:
        raise ModelError(f"cannot read the model {model}: {error.strerror}; give a .gguf file with -m") from error
    del found["file"]
    return found


def places(model: Path) -> list[Path]:
    """Where the calibration of ``model`` may stand, in the order in which it is looked for and written."""
    beside = model.with_name(model.stem + SUFFIX)
    data = user_folder("data")
    if data is None:
        return [beside]
    return [beside, data / "calibrations" / f"{model.stem}-{fingerprint(model)['sha256'][:12]}{SUFFIX}"]


def find(model: Path) -> Calibration:
    """The calibration of ``model``. Raises UsageError with the command that makes it, if there is none or another model's."""
    command = f"zoomr calibrate -m {shlex.quote(str(model))}"
    now, wrong = fingerprint(model), []
    for path in places(model):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            wrong.append(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
            continue
        try:
            return from_json(text, now)
        except ValueError as error:
            wrong.append(f"{path} {error}")
    if wrong:
        raise UsageError(f"--policy reasonalloc: {'; '.join(wrong)}: {command}")
    raise UsageError(f"--policy reasonalloc needs to know how many tokens each layer of {model.name} attends to, once: {command}")


def check_target(target: Path) -> None:
    """Raise UsageError if no calibration can or should be written to ``target``: before minutes are spent on one."""
    if not os.path.isdir(target.parent) or not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{target} cannot be written: {target.parent} is no folder that this user may write to; name another file with -o")
    if not os.path.lexists(target):
        return
    held = None
    if target.is_file() and target.stat().st_size <= _MOST_BYTES:
        try:
            held = json.loads(target.read_bytes())
        except (OSError, ValueError):
            pass
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise UsageError(f"{target} is there, and is no calibration; remove it or name another file with -o")


def write(calibration: Calibration, model: Path, target: Path | None) -> Path:
    """Write ``calibration`` to ``target``, or to the first of `places` that can be written; which that was.

    An older one is whole until the new one is. Raises UsageError, with the reason, if none can be.
    """
    failed = []
    for path in [target] if target else places(model):
        try:
            if target is None and path != model.with_name(path.name):
                path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_atomically(path, to_json(calibration).encode())
            except PermissionError:
                if not path.is_file():
                    raise
                path.write_text(to_json(calibration), encoding="utf-8")  # the folder is not ours but the file is, and it is the one that is found
            return path
        except OSError as error:
            failed.append(f"{path}: {error.strerror or error}")
    raise UsageError(f"the calibration cannot be written ({'; '.join(failed)}); name a file with -o")
