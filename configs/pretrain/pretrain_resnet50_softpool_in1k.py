# ResNet-50 with SoftPool, pre-trained on ImageNet-1K (paper, section 4.1).
_base_ = "../_base_/pretrain_in1k.py"
