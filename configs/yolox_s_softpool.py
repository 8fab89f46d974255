# YOLOX-s on COCO, mmdet's own config, with SoftPool in the SPP block: windows of 5, 9 and 13.
_base_ = ["mmdet::yolox/yolox_s_8xb8-300e_coco.py", "./_base_/exact_resume.py"]

model = dict(
    backbone=dict(_delete_=True, type="SoftPoolBackbone", backbone={{_base_.model.backbone}})
)
default_hooks = _base_.pop("exact_resume")
