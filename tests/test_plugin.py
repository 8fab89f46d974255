"""What a training leaves behind opens in MMDetection's own tools and API, in a fresh process that
has only the config's ``custom_imports``."""

import json
import re
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import FUNCTIONS, HOOKS, MODELS, TRANSFORMS

import mmsoftpool
from make_shapes import make_shapes

from .common import ROOT, config_path, execute

MMDET_TOOLS = Path(mmdet.__file__).parent / ".mim" / "tools"
OPTIONS = (
    "train_cfg.max_epochs=1",
    "train_dataloader.batch_size=4",
    "default_hooks.logger.interval=1",
    "model.backbone.base_channels=8",
    "model.neck.in_channels=[8,16,32,64]",
    "model.test_cfg.score_thr=0",
)
NAME = "demo_retinanet_softpool"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training with ``tools/train.py``: shapes/ and run/."""
    root = tmp_path_factory.mktemp("plugin")
    make_shapes(root / "shapes", train=8, val=2)
    options = ("--work-dir", root / "run", "--cfg-options", f"data_root={root}/shapes", *OPTIONS)
    execute("tools/train.py", config_path(NAME), *options)
    return root


@pytest.fixture(scope="module")
def saved(run):
    """The saved config, the checkpoint and an image, as strings."""
    return (
        str(run / "run" / f"{NAME}.py"),
        str(run / "run" / "epoch_1.pth"),
        str(run / "shapes" / "val" / "000000.jpg"),
    )


def test_the_saved_config_is_what_the_user_wrote(run, saved):
    expected = Config.fromfile(config_path(NAME))
    expected.merge_from_dict(
        {
            "train_cfg.max_epochs": 1,
            "train_dataloader.batch_size": 4,
            "default_hooks.logger.interval": 1,
            "model.backbone.base_channels": 8,
            "model.neck.in_channels": [8, 16, 32, 64],
            "model.test_cfg.score_thr": 0,
        }
    )
    found = Config.fromfile(saved[0])
    checkpoint = Config.fromstring(torch.load(saved[1], weights_only=False)["meta"]["cfg"], ".py")
    root = f"{run}/shapes/"
    for cfg in (found, checkpoint):
        written = cfg.to_dict()
        for key in ("work_dir", "launcher"):  # arguments of the command
            written.pop(key)
        text = json.dumps(written).replace(root, "data/shapes/")
        assert json.loads(text) == json.loads(json.dumps(expected.to_dict()))


API = """
import sys
from mmdet.apis import DetInferencer, inference_detector, init_detector

assert "mmsoftpool" not in sys.modules
config, checkpoint, image = sys.argv[1:]
"""


def test_init_detector_and_inference_detector(run_script, saved):
    code = API + (
        "detector = init_detector(config, checkpoint, device='cpu')\n"
        "found = inference_detector(detector, image).pred_instances\n"
        "print(type(detector.backbone.maxpool).__name__, len(found), detector.dataset_meta)"
    )
    out = run_script("-c", code, *saved).stdout
    assert re.search(r"SoftPool2d [1-9]\d* .*'disc', 'square', 'triangle', 'star'", out)


def test_det_inferencer_of_the_checkpoint_alone(run_script, saved):
    code = API + (
        "found = DetInferencer(weights=checkpoint, device='cpu')(image)['predictions'][0]\n"
        "print('found', len(found['scores']))"
    )
    assert re.search(r"found [1-9]", run_script("-c", code, *saved).stdout)


def test_mmdets_test_has_the_metrics_of_ours(run_script, run_tool, run, saved):
    arguments = (*saved[:2], "--work-dir", run / "test")
    theirs = run_script(MMDET_TOOLS / "test.py", *arguments).stdout
    status, ours, _ = run_tool("test", *arguments)
    assert status == 0
    theirs, ours = (re.findall(r"coco/bbox_mAP\S*: \S+", out) for out in (theirs, ours))
    assert theirs and theirs == ours


def test_mmdets_train_ends_in_the_same_weights(run_script, run, saved):
    run_script(MMDET_TOOLS / "train.py", saved[0], "--work-dir", run / "again")
    ours, theirs = (
        torch.load(path, weights_only=False)["state_dict"]
        for path in (saved[1], run / "again" / "epoch_1.pth")
    )
    assert ours.keys() == theirs.keys()
    assert all(value.equal(theirs[key]) for key, value in ours.items())


def test_get_flops_counts_soft_pool(run_script, saved):
    tool = MMDET_TOOLS / "analysis_tools" / "get_flops.py"
    out = run_script(tool, saved[0], "--num-images", 1)
    assert re.search(r"Flops: [\d.]+[MG]", out.stdout)
    assert "mmsoftpool::soft_pool" not in out.stdout + out.stderr  # as an unsupported operator


def test_analyze_logs_reads_the_log(run_script, run):
    (log,) = (run / "run").glob("*/vis_data/scalars.json")
    tool = MMDET_TOOLS / "analysis_tools" / "analyze_logs.py"
    assert "average iter time" in run_script(tool, "cal_train_time", log).stdout


def test_mim_trains_and_tests(run_script, run, saved):
    pytest.importorskip("mim")
    code = "from mim.cli import cli; cli()"
    out = run_script(
        "-c", code, "test", "onedl-mmdetection", saved[0], "--checkpoint", saved[1], "--gpus", "0"
    )
    assert "Testing finished successfully" in out.stdout


def test_importing_mmsoftpool_imports_no_models(run_script):
    code = (
        "import sys, mmsoftpool\n"
        "print([n for n in ('mmdet.models', 'mmcv.ops', 'mmengine.runner') if n in sys.modules])"
    )
    assert run_script("-c", code).stdout == "[]\n"


def test_every_registered_name_builds():
    from mmsoftpool.registry import MODELS as OURS

    arguments = {"kernel_size": 2, "channels": 4, "output_size": 2, "depth": 50}
    resnet = dict(type="mmdet.ResNet", depth=18)
    built = []
    for name, module in OURS.module_dict.items():
        if name == "GoogLeNet":
            pytest.importorskip("torchvision")
        cfg = dict(type=f"mmsoftpool.{name}")
        if name == "SoftPoolBackbone":
            cfg["backbone"] = resnet
        elif name.startswith("SoftPoolRes"):
            cfg |= dict(depth=50)
        elif name != "GoogLeNet":
            parameters = module.__init__.__code__.co_varnames
            cfg |= {key: arguments[key] for key in parameters if key in arguments}
            cfg.setdefault("output_size" if "Adaptive" in name else "kernel_size", 2)
        assert isinstance(MODELS.build(cfg), torch.nn.Module), name
        built.append(name)
    assert len(built) == len(OURS.module_dict) >= 11
    for name in ("AtomicCheckpointHook", "EpochSeedHook", "MissedValidationHook"):
        assert type(HOOKS.build(dict(type=name))).__name__ == name
    # Names in the configs of checkpoints of development versions.
    assert type(TRANSFORMS.build(dict(type="NamingLoadImageFromFile"))).__name__ == (
        "LoadImageFromFile"
    )
    assert FUNCTIONS.get("keep_torch_seed")(0) is None


def test_generic_names_stay_in_the_scope(run_script):
    """A user's own module of the same name is neither replaced nor an obstacle."""
    code = (
        "from mmengine.registry import MODELS\n"
        "@MODELS.register_module()\n"
        "class SumPool2d: pass\n"
        "@MODELS.register_module()\n"
        "class SoftPool2d: pass\n"
        "import mmsoftpool\n"
        f"import sys; sys.path.append({str(ROOT / 'paper')!r}); import pooling_methods\n"
        "for name in ('SumPool2d', 'SoftPool2d'):\n"
        "    print(MODELS.get(name).__module__, MODELS.get(f'mmsoftpool.{name}').__module__)"
    )
    result = run_script("-W", "always", "-c", code)
    assert result.stdout.splitlines() == [
        "__main__ pooling_methods",
        "__main__ mmsoftpool.ops.modules",
    ]
    assert "which is kept; use mmsoftpool.SoftPool2d" in result.stderr


def test_the_version_needs_no_installation(run_script):
    code = (
        "import importlib.metadata\n"
        "def version(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.version = version\n"
        "import mmsoftpool; print(mmsoftpool.__version__)"
    )
    assert run_script("-c", code).stdout.strip() == mmsoftpool.__version__
