"""GoogLeNet: torchvision's network as a backbone."""

import torch
from mmengine.registry import MODELS
from torchvision.models import googlenet
from torchvision.models.feature_extraction import create_feature_extractor

from ..common import randn

LEVELS = ["conv3", "inception3b", "inception4e", "inception5b"]


def test_its_levels_are_torchvisions(tmp_path):
    theirs = googlenet(aux_logits=False, init_weights=True).eval()
    path = str(tmp_path / "googlenet.pth")
    torch.save(theirs.state_dict(), path)
    init_cfg = dict(type="Pretrained", checkpoint=path)
    ours = MODELS.build(dict(type="mmsoftpool.GoogLeNet", init_cfg=init_cfg)).eval()
    ours.init_weights()
    keys = [key for key in theirs.state_dict() if not key.startswith("fc.")]
    assert list(ours.state_dict()) == keys
    x = randn(2, 3, 75, 64)
    with torch.no_grad():
        levels, expected = ours(x), create_feature_extractor(theirs, LEVELS)(x)
    assert [level.shape[1] for level in levels] == [192, 480, 832, 1024]
    assert isinstance(levels, tuple) and len(levels) == len(LEVELS)
    assert all(ours.equal(theirs) for ours, theirs in zip(levels, expected.values(), strict=True))
