"""``python -m mmsoftpool``: the environment, its problems with suggested fixes, a self-test."""

import sys

from .environment import main

sys.exit(main())
