"""`python -m dsmoe` is the `dsmoe` command."""

from dsmoe.cli import main

raise SystemExit(main())
