# The twin of retinanet_r50_softpool.py with max pooling: the same in everything else.
_base_ = "./retinanet_r50_softpool.py"

model = dict(
    backbone=dict(stem_pool=dict(type="torch.nn.MaxPool2d", kernel_size=3, stride=2, padding=1))
)
