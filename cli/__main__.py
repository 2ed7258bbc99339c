"""`python -m zoomr_cli` is `zoomr`."""

from .main import main

if __name__ == "__main__":
    raise SystemExit(main())
