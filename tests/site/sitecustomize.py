"""Lets torchvision import in the test environment, where torch may have no CUDA.

PyPI's torchvision is linked to CUDA. On a CPU-only torch its operators do not load, and its Python
part then fails to describe ``torchvision::nms`` and ``qnms``. With the two declared it imports, and
all but those operators works. Python runs this file at its start where tests/site is on the path.
"""

import importlib.machinery
import sys
from pathlib import Path


class _DeclareOperators:
    """Looks before the usual finders when torchvision is imported."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision" or self.library:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return None
        import torch

        try:
            for compiled in Path(spec.origin).parent.glob("_C*.so"):
                torch.ops.load_library(compiled)
        except OSError:
            self.library = torch.library.Library("torchvision", "DEF")
            for schema in (
                "nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
                "qnms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
            ):
                self.library.define(schema)
        return spec


sys.meta_path.insert(0, _DeclareOperators())
