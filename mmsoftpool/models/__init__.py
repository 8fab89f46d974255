"""Backbones for configs, and the pooling methods that the paper compares SoftPool with.

``import mmsoftpool`` registers their names; see :mod:`mmsoftpool.registry`.
"""
