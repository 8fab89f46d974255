# Inception v3 with SoftPool, pre-trained on ImageNet-1K (paper, section 4.1; Tables 4 and 6). All
# its 13 pools are replaced, column VII of Table 6; column III, for example, has
# include=["timm_model.Pool?", "timm_model.Mixed_5*"]. Without auxiliary classifiers and dropout,
# which the paper does not mention.
_base_ = "../_base_/pretrain_in1k.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="SoftPoolBackbone",
        include="*",  # also the pools in the blocks, which are functional
        backbone=dict(
            type="mmpretrain.TIMMBackbone",
            model_name="inception_v3",
            features_only=True,
            out_indices=(4,),
        ),
    ),
)
