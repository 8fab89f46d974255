"""``python -m mmsoftpool``, the same as the command ``mmsoftpool``."""

from .cli import main

main()
