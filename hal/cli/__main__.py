"""``python -m hal.cli``: the same as the ``hal`` script."""

from hal.cli._main import main

raise SystemExit(main())
