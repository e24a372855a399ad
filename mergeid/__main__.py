"""``python -m mergeid`` is the command ``mergeid``."""

from mergeid.commands.cli import main

if __name__ == "__main__":
    main()
