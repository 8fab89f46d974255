# bccd_retinanet_r50_softpool.py with max pooling in the stem, for comparison.
_base_ = "./bccd_retinanet_r50_softpool.py"

model = dict(backbone=dict(stem_pool=dict(type="torch.nn.MaxPool2d")))
