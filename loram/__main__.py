"""`python -m loram` is `loram`, so that launchers can start it: `accelerate launch -m loram train …`."""

from __future__ import annotations

from importlib import import_module

# By name: the command line imports the library, and here only is it the other way round.
raise SystemExit(import_module("loram_cli.app").main())
