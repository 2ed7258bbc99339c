"""The `zoomr` command: one file a command, `main.py` joins them, `render.py` draws events.

Ships as the package `zoomr_cli`. Everything heavy (numpy, rich, the native library) is imported inside the
commands, so that `zoomr --help` is quick and works before the library is built. Exit codes: 0 done, 1 failed,
2 used wrongly (both of those are errors, which know their own: `zoomr_local/errors.py`), 3 some items failed, 130 interrupted.
"""

SOME_FAILED = 3
INTERRUPTED = 130
