"""``python -m tpshard``."""

from tpshard.cli.main import main

main()
