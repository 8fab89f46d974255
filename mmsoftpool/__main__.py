"""``python -m mmsoftpool``: what runs here, whether it fits together, and a self-test."""

import sys

from .environment import main

sys.exit(main())
