#!/usr/bin/env python
"""``mmsoftpool train``, at the place where MMDetection's users and mim look for it."""

import sys

from mmsoftpool.cli import main

main(["train", *sys.argv[1:]])
