# The twin of demo_retinanet_softpool.py with max pooling: the same in everything else.
_base_ = "./demo_retinanet_softpool.py"

model = dict(
    backbone=dict(stem_pool=dict(type="torch.nn.MaxPool2d", kernel_size=3, stride=2, padding=1))
)
