"""``python -m tpshard``."""

from tpshard.cli.main import main

if __name__ == "__main__":
    main()
