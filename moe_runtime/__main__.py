"""`python -m moe_runtime` is the `moe-runtime` command."""

from moe_runtime.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
