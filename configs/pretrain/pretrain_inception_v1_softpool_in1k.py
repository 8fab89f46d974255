# Inception v1 with SoftPool, pre-trained on ImageNet-1K (paper, section 4.1; Tables 4 and 5). All
# its 13 max pools are replaced. Without auxiliary classifiers and dropout, which the paper does not
# mention.
_base_ = "../_base_/pretrain_in1k.py"

model = dict(
    backbone=dict(
        _delete_=True, type="SoftPoolBackbone", backbone=dict(type="mmsoftpool.GoogLeNet")
    ),
    head=dict(in_channels=1024),
)
