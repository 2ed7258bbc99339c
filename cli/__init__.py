"""The `zoomr` command: one file a command, `main.py` joins them, `render.py` draws events.

Ships as the package `zoomr_cli`. Everything heavy (numpy, rich, the native library) is imported inside the
commands, so that `zoomr --help` is quick and works before the library is built.
"""
