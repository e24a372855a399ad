"""``python tests/fuzz``: see ``--help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.run import main

sys.exit(main())
