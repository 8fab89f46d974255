# demo_retinanet_softpool.py, trained with alpha from 1 to 32: it ends as one for max pooling.
_base_ = "./demo_retinanet_softpool.py"

model = dict(backbone=dict(stem_pool=dict(type="SoftPool2d", alpha=32.0)))
custom_hooks = [dict(type="AlphaAnnealingHook", start=1.0)]
