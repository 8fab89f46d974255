# RTMDet-s on COCO, mmdet's own config, with SoftPool in the SPP block: windows of 5, 9 and 13.
_base_ = ["mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py", "./_base_/exact_resume.py"]

model = dict(
    backbone=dict(_delete_=True, type="SoftPoolBackbone", backbone={{_base_.model.backbone}})
)
default_hooks = _base_.pop("exact_resume")
