#!/usr/bin/env python
"""``mmsoftpool test``, at the place where MMDetection's users and mim look for it."""

import sys

from mmsoftpool.cli import main

main(["test", *sys.argv[1:]])
