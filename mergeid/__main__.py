"""``python -m mergeid`` is the command ``mergeid``."""

from mergeid.cli import main

if __name__ == "__main__":
    main()
