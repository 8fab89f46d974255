# The twin of yolox_s_softpool.py with max pooling: the same in everything else.
_base_ = "./yolox_s_softpool.py"

model = dict(backbone=dict(pool=dict(type="torch.nn.MaxPool2d")))
