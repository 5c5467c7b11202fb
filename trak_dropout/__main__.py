"""``python -m trak_dropout``: the ``trak-dropout`` command."""

import sys

from trak_dropout.cli import main

if __name__ == "__main__":
    sys.exit(main())
