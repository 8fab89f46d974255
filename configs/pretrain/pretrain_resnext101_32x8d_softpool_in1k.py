# ResNeXt-101 32x8d with SoftPool, pre-trained on ImageNet-1K (paper, section 4.1).
_base_ = "../_base_/pretrain_in1k.py"

model = dict(backbone=dict(type="mmdet.SoftPoolResNeXt", depth=101, groups=32, base_width=8))
