# DenseNet-169 with SoftPool, pre-trained on ImageNet-1K (paper, section 4.1).
_base_ = "pretrain_densenet121_softpool_in1k.py"

model = dict(backbone=dict(backbone=dict(model_name="densenet169")), head=dict(in_channels=1664))
