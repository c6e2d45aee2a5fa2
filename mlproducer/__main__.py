"""``python -m mlproducer``.

Runs on: the main thread.
"""

import sys

from mlproducer.cli import main

if __name__ == "__main__":
    sys.exit(main())
