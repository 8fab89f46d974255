# bccd_retinanet_softpool.py with the gradient that the paper's authors trained with (section 3.2).
_base_ = "./bccd_retinanet_softpool.py"

model = dict(backbone=dict(stem_pool=dict(type="SoftPool2d", gradient="paper")))
