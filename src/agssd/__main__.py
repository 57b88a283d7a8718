"""``python -m agssd``, the same as ``agssd``, for launchers that start Python modules."""

import sys

from agssd.cli import main

if __name__ == "__main__":
    sys.exit(main())
