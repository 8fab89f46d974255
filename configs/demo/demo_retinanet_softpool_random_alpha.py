# demo_retinanet_softpool.py, trained with alphas from 0.5 to 8: one detector for every alpha.
_base_ = "./demo_retinanet_softpool.py"

custom_hooks = [dict(type="RandomAlphaHook", low=0.5, high=8.0)]
