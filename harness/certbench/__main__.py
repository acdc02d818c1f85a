"""``python -m certbench`` is the ``certbench`` command."""

from certbench.cli import main

main()
