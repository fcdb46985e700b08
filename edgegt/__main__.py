"""`python -m edgegt` is the same as `edgegt`."""

from edgegt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
