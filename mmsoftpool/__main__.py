"""``python -m mmsoftpool``: what runs here, whether it fits together, and a self-test."""

import sys

from .collect_env import main

sys.exit(main())
