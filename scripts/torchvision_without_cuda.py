"""Lets PyPI's torchvision import where torch has no CUDA; scripts/setup_env.sh puts it to use.

PyPI's torchvision is linked to CUDA. With a CPU-only torch its operators do not load, and importing
it ends with "operator torchvision::nms does not exist". With that one and its quantized twin
declared it imports, and all but its own operators works: the models, which is what is needed of it.
"""

import importlib.machinery
import sys
from pathlib import Path


class _DeclareOperators:
    """Comes before the usual finders when torchvision is imported."""

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
            for operator in ("nms", "qnms"):
                self.library.define(
                    f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor"
                )
        return spec


sys.meta_path.insert(0, _DeclareOperators())
