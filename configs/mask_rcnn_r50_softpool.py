# Mask R-CNN with a SoftPool ResNet-50 on COCO, mmdet's 1x schedule (paper, section 4.6, Table 8).
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["mmsoftpool"])

model = dict(
    backbone=dict(
        type="SoftPoolResNet",
        # torchvision's ImageNet weights (IMAGENET1K_V1), by their address: mmengine would need
        # torchvision to resolve torchvision://resnet50.
        init_cfg=dict(checkpoint="https://download.pytorch.org/models/resnet50-0676ba61.pth"),
    )
)
