# DenseNet-121 with SoftPool, pre-trained on ImageNet-1K (paper, section 4.1). As in the paper, the
# max pool after the first layer and the average pools between the dense blocks are replaced.
_base_ = "../_base_/pretrain_in1k.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="SoftPoolBackbone",
        backbone=dict(
            type="mmpretrain.TIMMBackbone",
            model_name="densenet121",
            features_only=True,
            out_indices=(4,),
        ),
    ),
    head=dict(in_channels=1024),
)
