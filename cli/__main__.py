"""`python -m loram_cli` is `loram`."""

from .app import main

raise SystemExit(main())
