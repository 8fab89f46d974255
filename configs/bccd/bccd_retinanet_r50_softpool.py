# RetinaNet-R50 on BCCD, fine-tuned for four epochs from weights that were pre-trained with max
# pooling, the commonest case. docs/results.md compares the pools.
_base_ = "./bccd_retinanet_softpool.py"

model = dict(
    backbone=dict(
        depth=50,
        base_channels=64,
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(
            _delete_=True,
            type="Pretrained",
            checkpoint="https://download.pytorch.org/models/resnet50-0676ba61.pth",
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
train_dataloader = dict(batch_size=4)
train_cfg = dict(max_epochs=4, val_interval=4)
optim_wrapper = dict(optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=1))
