# The twin of rtmdet_s_softpool.py with max pooling: the same in everything else.
_base_ = "./rtmdet_s_softpool.py"

model = dict(backbone=dict(pool=dict(type="torch.nn.MaxPool2d")))
