# A detector's SoftPool ResNet and the channels of its levels, by depth. A config takes one with
# `model = _base_.pop("resnets")[50]`: whatever stays in a base becomes part of the config.
resnets = {
    depth: dict(
        backbone=dict(
            type="SoftPoolResNet",
            depth=depth,
            # torchvision's ImageNet weights (IMAGENET1K_V1), by their address: mmengine would need
            # torchvision to resolve torchvision://resnet50.
            init_cfg=dict(checkpoint=f"https://download.pytorch.org/models/{weights}.pth"),
        ),
        neck=dict(in_channels=[channels * 2**level for level in range(4)]),
    )
    for depth, weights, channels in (
        (18, "resnet18-f37072fd", 64),
        (34, "resnet34-b627a593", 64),
        (50, "resnet50-0676ba61", 256),
        (101, "resnet101-63fe2227", 256),
    )
}
