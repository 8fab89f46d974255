# bccd_retinanet_softpool.py with average pooling in the stem, for comparison.
_base_ = "./bccd_retinanet_softpool.py"

model = dict(backbone=dict(stem_pool=dict(type="torch.nn.AvgPool2d", count_include_pad=False)))
