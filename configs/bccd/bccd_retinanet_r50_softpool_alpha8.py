# bccd_retinanet_r50_softpool.py with a sharper SoftPool.
_base_ = "./bccd_retinanet_r50_softpool.py"

model = dict(backbone=dict(stem_pool=dict(type="SoftPool2d", alpha=8.0)))
