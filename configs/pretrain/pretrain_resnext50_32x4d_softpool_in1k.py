# ResNeXt-50 32x4d with SoftPool, pre-trained on ImageNet-1K (paper, section 4.1).
_base_ = "../_base_/pretrain_in1k.py"

model = dict(backbone=dict(type="mmdet.SoftPoolResNeXt", groups=32, base_width=4))
