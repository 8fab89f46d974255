"""The other pooling methods against loops over windows, from each paper's formula."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from make_shapes import make_shapes
from mmsoftpool import soft_pool2d
from mmsoftpool.config import load_config
from mmsoftpool.models import SoftPoolResNet
from mmsoftpool.runner import train
from pooling_methods import METHODS

from ..common import config_path, quick_and_slow, rand, randn

OTHERS = [name for name in METHODS if name not in ("average", "maximum", "softpool")]
TRAINABLE = ["lp", "gate", "lite-s3dpp", "lip"]
PER_CHANNEL = ["lp", "lip", "lite-s3dpp"]
RANDOM = ["lite-s3dpp", "stochastic", "s3"]

# kernel_size, stride, padding, dilation, ceil_mode, input size
GRIDS = [
    (2, 2, 0, 1, False, (6, 8)),
    (3, 2, 1, 1, False, (7, 9)),
    (3, 2, 1, 1, True, (8, 9)),
    ((3, 2), (1, 3), (1, 0), 1, True, (6, 9)),
    (2, 3, 0, 1, False, (8, 7)),
    (3, 2, 1, 2, False, (9, 10)),
    (3, 3, 0, 1, True, (7, 8)),
    (1, 1, 0, 1, False, (1, 1)),
]


def build(name, *pooling, **settings):
    keys = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return MODELS.build({**METHODS[name], **dict(zip(keys, pooling, strict=False)), **settings})


def build_double(name, *pooling, channels=2, **settings):
    """Builds a pool in float64, with random parameters."""
    if name in PER_CHANNEL:
        settings["channels"] = channels
    pool = build(name, *pooling, **settings).double()
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.3)
    return pool


def pair(value):
    return (value, value) if isinstance(value, int) else value


def windows(size, out, kernel_size, stride, padding, dilation):
    """Yields every output position with (tap, place) of its present taps."""
    kernel_size, stride, padding, dilation = map(pair, (kernel_size, stride, padding, dilation))
    for position in itertools.product(*map(range, out)):
        inside = []
        for tap in itertools.product(*map(range, kernel_size)):
            place = tuple(
                o * s - p + t * d
                for o, s, p, t, d in zip(position, stride, padding, tap, dilation, strict=True)
            )
            if all(0 <= i < n for i, n in zip(place, size, strict=True)):
                inside.append((tap, place))
        yield position, inside


def mean(values):
    return math.fsum(values) / len(values)


def norm(values, p):
    return math.fsum(abs(v) ** p for v in values) ** (1 / p)


def weighted_mean(weights, values):
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


def by_definition(name, pool, x, out, pooling):
    """Computes the expectation of a method by loops, in float64."""
    kernel_size, stride, padding, dilation, _ = pooling
    parameters = {key: value.detach() for key, value in pool.named_parameters()}
    if name == "lip":  # by torch's own layers
        conv = F.conv2d(x, parameters["weight"], padding=1)
        normalise = nn.InstanceNorm2d(2, affine=True).double().eval()
        normalise.load_state_dict(dict(weight=parameters["scale"], bias=parameters["shift"]))
        flat = conv[0, 0].numel() == 1  # torch's layer rejects it
        logits = 12 * torch.sigmoid(parameters["shift"].view(2, 1, 1) if flat else normalise(conv))
        logits = logits.detach().expand_as(x)

    def window(n, c, inside):
        values = [x[(n, c, *place)].item() for _, place in inside]
        if name == "power-average":
            return norm(values, 2)
        if name == "sum":
            return math.fsum(values)
        if name == "lp":
            p = 1 + math.log(1 + math.exp(parameters["rho"][c]))
            return norm(values, p) / len(values) ** (1 / p)
        if name == "gate":
            dot = math.fsum(
                parameters["weight"][tap].item() * v
                for (tap, _), v in zip(inside, values, strict=True)
            )
            share = 1 / (1 + math.exp(-dot))
            return share * max(values) + (1 - share) * mean(values)
        if name == "lip":
            weights = [math.exp(logits[(n, c, *place)].item()) for _, place in inside]
            return weighted_mean(weights, values)
        if name == "stochastic":
            weights = [max(v, 0) for v in values]
            return weighted_mean(weights if any(weights) else [1] * len(values), values)
        if name == "s3":
            return max(values)
        if name == "lite-s3dpp":
            alpha, power = (parameters[f"log_{key}"][c].exp().item() for key in ("alpha", "lambda"))
            centre = mean(values)
            weights = [alpha + math.sqrt((v - centre) ** 2 + 0.001) ** power for v in values]
            return weighted_mean(weights, values)

    y = x.new_zeros(*x.shape[:2], *out)
    sampled = name in ("s3", "lite-s3dpp")
    strides = pair(stride)
    if sampled:  # every position of the window, to the start of the last one
        kernels, pads, dilations = map(pair, (kernel_size, padding, dilation))
        slides = [
            max(n + 2 * p - d * (k - 1), (o - 1) * s + 1)
            for n, p, d, k, o, s in zip(
                x.shape[2:], pads, dilations, kernels, out, strides, strict=True
            )
        ]
    for n, c in itertools.product(*map(range, x.shape[:2])):
        if sampled:
            dense = {
                position: window(n, c, inside)
                for position, inside in windows(
                    x.shape[2:], slides, kernel_size, 1, padding, dilation
                )
            }
            for position in itertools.product(*map(range, out)):
                cell = itertools.product(
                    *(
                        range(o * s, min((o + 1) * s, slide))
                        for o, s, slide in zip(position, strides, slides, strict=True)
                    )
                )
                y[(n, c, *position)] = mean([dense[place] for place in cell])
        else:
            grid = windows(x.shape[2:], out, kernel_size, stride, padding, dilation)
            for position, inside in grid:
                y[(n, c, *position)] = window(n, c, inside)
    return y


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_evaluation_is_the_papers_formula(name, grid):
    torch.manual_seed(0)  # for the parameters
    *pooling, size = grid
    pool = build_double(name, *pooling).eval()
    x = randn(2, 2, *size).double()
    out = F.max_pool2d(x, *pooling).shape[2:]
    expected = by_definition(name, pool, x, out, pooling)
    torch.testing.assert_close(pool(x).detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_gradients(name):
    torch.manual_seed(0)  # for the parameters
    pool = build_double(name, 3, 2, 1)
    x = randn(1, 2, 5, 6).double().requires_grad_()
    parameters = tuple(pool.parameters())

    def run(x, *parameters):
        torch.manual_seed(1)  # the same draw every time
        return pool(x)

    for mode in (True, False) if name in RANDOM else (False,):
        pool.train(mode)
        assert torch.autograd.gradcheck(run, (x, *parameters))


class TestClosedForms:
    x = rand(2, 3, 7, 9) - 0.3

    def test_power_average(self):
        pool = build("power-average", 3, 2, 1, norm_type=1)
        torch.testing.assert_close(pool(self.x), build("sum", 3, 2, 1)(self.x.abs()))
        pool = build("power-average", 3, 2, 1, norm_type=2000)
        torch.testing.assert_close(
            pool(self.x), F.max_pool2d(self.x.abs(), 3, 2, 1), rtol=2e-3, atol=0
        )
        pool = build("power-average", 2, 2, norm_type=2)
        torch.testing.assert_close(pool(self.x.abs()), F.lp_pool2d(self.x.abs(), 2.0, 2, 2))

    def test_sum(self):
        torch.testing.assert_close(
            build("sum", 3, 2, 1)(self.x), F.avg_pool2d(self.x, 3, 2, 1, divisor_override=1)
        )

    def test_learned_norm_starts_as_the_root_mean_square(self):
        expected = F.avg_pool2d(self.x**2, 3, 2, 1, count_include_pad=False).sqrt()
        torch.testing.assert_close(build("lp", 3, 2, 1)(self.x), expected)

    def test_learned_norm_can_start_elsewhere(self):
        pool = build("lp", 2, 2, norm_type=3.0)
        expected = F.avg_pool2d(self.x.abs() ** 3, 2, 2) ** (1 / 3)
        torch.testing.assert_close(pool(self.x), expected)

    def test_gate_starts_in_the_middle_and_saturates(self):
        pool = build("gate", 3, 2, 1)
        x = self.x + 1
        largest, average = F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1, False, False)
        torch.testing.assert_close(pool(x), (largest + average) / 2)
        nn.init.constant_(pool.weight, 1e3)
        torch.testing.assert_close(pool(x), largest)
        nn.init.constant_(pool.weight, -1e3)
        torch.testing.assert_close(pool(x), average)

    def test_lip_starts_as_average_pooling(self):
        expected = F.avg_pool2d(self.x, 3, 2, 1, count_include_pad=False)
        torch.testing.assert_close(build("lip", 3, 2, 1)(self.x), expected)

    def test_lip_with_the_identity_for_logits_is_soft_pool(self, monkeypatch):
        pool = build("lip", 3, 2, 1, channels=3, coefficient=1.0)
        monkeypatch.setattr(F, "layer_norm", lambda x, size: self.x)
        monkeypatch.setattr(torch.Tensor, "sigmoid", lambda x: x)
        torch.testing.assert_close(pool(self.x), soft_pool2d(self.x, 3, 2, 1))

    def test_detail_preserving_without_detail_is_an_average_of_averages(self):
        pool = build("lite-s3dpp", 2, 2, channels=3).eval()
        nn.init.constant_(pool.log_alpha, 50)  # the weights are alike
        dense = F.avg_pool2d(self.x, 2, 1)
        torch.testing.assert_close(pool(self.x), F.avg_pool2d(dense, 2, 2, ceil_mode=True))


class TestStochastic:
    def test_draws_taps_in_proportion_to_their_values(self):
        x = torch.tensor([[1.0, 2.0], [0.0, 5.0]])
        torch.manual_seed(0)
        drawn = build("stochastic", 2)(x.repeat(1, 200, 200)[None])
        frequencies = [(drawn == value).double().mean().item() for value in (1, 2, 0, 5)]
        # 40000 draws: four standard deviations are below 0.01
        assert frequencies == pytest.approx([1 / 8, 2 / 8, 0, 5 / 8], abs=0.01)

    def test_without_positive_taps_all_are_equally_likely(self):
        x = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
        torch.manual_seed(0)
        drawn = build("stochastic", 2)(x.repeat(1, 200, 200)[None])
        frequencies = [(drawn == value).double().mean().item() for value in (-1, -2, -3, -4)]
        assert frequencies == pytest.approx([1 / 4] * 4, abs=0.01)

    def test_padding_is_never_drawn(self):
        x = torch.full((1, 1, 9, 9), -1.0)
        assert build("stochastic", 3, 2, 1)(x).eq(-1).all()

    @pytest.mark.parametrize("name", RANDOM)
    def test_evaluation_is_the_mean_of_many_draws(self, name):
        torch.manual_seed(0)
        x = rand(1, 2, 7, 9)
        pool = build(name, 3, 2, 1)
        drawn = torch.stack([pool(x) for _ in range(3000)])
        error = drawn.std(0) / 3000**0.5
        expected = pool.eval()(x)
        assert ((drawn.mean(0) - expected).abs() <= 5 * error + 1e-6).all()


class TestS3Pool:
    def test_keeps_one_row_and_column_of_every_cell(self):
        x = torch.arange(81.0).view(1, 1, 9, 9)  # kernel 1: the rows and columns themselves
        pool = build("s3", 1, 2)
        seen = torch.zeros(9, 9)
        for _ in range(100):
            kept = pool(x)[0, 0]
            rows, columns = kept[:, 0].long() // 9, kept[0].long() % 9
            assert kept.equal(x[0, 0][rows][:, columns])
            for indices in (rows, columns):
                assert (indices // 2).equal(torch.arange(5))
            seen[rows.view(-1, 1), columns] += 1
        assert (seen > 0).all()

    @pytest.mark.parametrize(("size", "out"), [(8, 4), (10, 5), (9, 5), (13, 7)])
    def test_larger_grids_keep_their_share_of_every_strip_in_order(self, size, out):
        x = torch.arange(float(size)).view(1, 1, size, 1).expand(-1, -1, -1, size)
        pool = build("s3", 1, 2, grid_size=4)
        seen = torch.zeros(size)
        for _ in range(300):
            rows = pool(x)[0, 0, :, 0].long()
            assert len(rows) == out and (rows.diff() > 0).all()
            assert (rows // 4).equal(torch.arange(out) // 2)
            seen[rows] += 1
        assert (seen > 0).all()

    @pytest.mark.parametrize("grid_size", [3, 1, (2, 3), 0, (2, 2, 2)])
    def test_grid_size_is_a_multiple_of_the_stride(self, grid_size):
        with pytest.raises(ValueError, match=r"grid_size must be a multiple of stride=\(2, 2\)"):
            build("s3", 3, 2, grid_size=grid_size)


class TestAnyInput:
    @pytest.mark.parametrize("name", OTHERS)
    def test_finite_values_and_gradients_for_finite_inputs(self, name):
        torch.manual_seed(0)  # for the samples
        normal = randn(2, 3, 9, 9)
        for scale, mode in itertools.product((0, 1e-30, 1e-3, 1, -1, 1e3, 1e15), (True, False)):
            for x in (scale * normal, scale * normal.abs()):
                pool = build(name, 3, 2, 1).train(mode)
                y = pool(x.requires_grad_())
                grads = torch.autograd.grad(y.sum(), (x, *pool.parameters()))
                assert all(t.isfinite().all() for t in (y, *grads)), (scale, mode)

    @pytest.mark.parametrize("name", OTHERS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_16_bit_types_are_computed_in_float32(self, name, dtype):
        x = rand(3, 8, 8).to(dtype)
        pool = build(name, 3, 2, 1).eval()
        y = pool(x)  # unbatched
        assert y.dtype == dtype and y.shape == (3, 4, 4)
        assert y.equal(pool(x.float()[None])[0].to(dtype))

    @pytest.mark.parametrize("name", OTHERS)
    def test_mistakes(self, name):
        with pytest.raises(ValueError, match="padding must be at most half"):
            build(name, 2, padding=2)
        with pytest.raises(TypeError, match=r"dtypes .* got torch\.int64"):
            build(name, 2)(torch.ones(1, 1, 4, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match="too small"):
            build(name, 5)(torch.ones(1, 1, 4, 4))

    @pytest.mark.parametrize(
        ("name", "setting"),
        [
            ("power-average", dict(norm_type=0.5)),
            ("lp", dict(norm_type=1)),
            ("lite-s3dpp", dict(eps=0)),
            ("lip", dict(channels=0)),
        ],
    )
    def test_settings_out_of_range(self, name, setting):
        (key,) = setting
        with pytest.raises(ValueError, match=f"{key} must be .* got {setting[key]}"):
            build(name, 2, **setting)


@pytest.mark.parametrize("name", OTHERS)
def test_compiles_without_graph_breaks(name):
    known = dict(channels=2) if name in PER_CHANNEL else {}
    pool = build(name, 3, 2, 1, **known).eval()
    torch._dynamo.reset()
    x = rand(1, 2, 7, 8)
    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), pool(x))


@pytest.mark.parametrize("name", PER_CHANNEL)
class TestChannels:
    x = rand(1, 3, 8, 8)

    def test_are_set_by_the_first_forward(self, name):
        pool = build(name, 2)
        optimizer = torch.optim.SGD(pool.parameters(), lr=1.0)  # before it is known
        before = build(name, 2, channels=3).state_dict()
        pool(self.x).square().sum().backward()
        assert all(value.equal(before[key]) for key, value in pool.state_dict().items())
        optimizer.step()
        assert any(not value.equal(before[key]) for key, value in pool.state_dict().items())

    def test_are_set_by_a_checkpoint(self, name):
        trained = build_double(name, 2, channels=3).float()
        pool = build(name, 2)
        pool.load_state_dict(trained.state_dict())
        assert pool.channels == 3
        assert pool.eval()(self.x).equal(trained.eval()(self.x))

    def test_another_number_is_refused(self, name):
        with pytest.raises(ValueError, match=r"channels=1 channels, got \(1, 3, 8, 8\)"):
            build(name, 2, channels=1)(self.x)

    def test_an_unknown_number_cannot_be_saved(self, name):
        with pytest.raises(ValueError, match="uninitialized"):
            build(name, 2).state_dict()

    def test_are_set_by_the_backbone(self, name):
        stem_pool = dict(METHODS[name], kernel_size=3, stride=2, padding=1)
        pool = SoftPoolResNet(18, base_channels=16, stem_pool=stem_pool).maxpool
        assert pool.channels == 16 and {len(p) for p in pool.parameters()} == {16}
        assert "channels" not in stem_pool


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, train=4, val=1, size=64)
    return root


@pytest.mark.parametrize("name", quick_and_slow(METHODS, "lip", "s3"))
def test_a_detector_trains_with_it(name, shapes, tmp_path):
    options = {
        "data_root": str(shapes),
        "model.backbone.stem_pool": dict(METHODS[name], kernel_size=3, stride=2, padding=1),
        "train_dataloader.batch_size": 2,
        "train_dataloader.num_workers": 0,
        "train_cfg": dict(_delete_=True, type="IterBasedTrainLoop", max_iters=2),
        "default_hooks.checkpoint.by_epoch": False,
        "param_scheduler": [],
        "experiment_name": name,
    }
    for key in ("val", "test"):
        options |= {f"{key}_dataloader": None, f"{key}_evaluator": None, f"{key}_cfg": None}
    path = config_path("demo_retinanet_softpool")
    runner = train(load_config(path, options, str(tmp_path)))
    assert runner.iter == 2
    pool = runner.model.backbone.maxpool
    assert type(pool) is type(build(name, 3))
    trained = dict(pool.named_parameters())
    assert bool(trained) == (name in TRAINABLE)
    if trained:
        known = dict(channels=32) if name in PER_CHANNEL else {}
        for key, value in build(name, 3, **known).named_parameters():
            assert value.shape == trained[key].shape and not value.equal(trained[key]), key
