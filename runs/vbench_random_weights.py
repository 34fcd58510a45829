"""Random weights where VBench looks for them, to try `aad1 vbench run` without a download.

Run by the Python of VBench's environment, in the checkout:

    python .../runs/vbench_random_weights.py CACHE TORCH_HOME

For seven dimensions; I2V background (DreamSim) needs CUDA and files of its own. CLIP and DINO are
tiny.
The scores mean nothing: what is shown is that VBench's own code runs through.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from clip.model import CLIP
from easydict import EasyDict
from omegaconf import OmegaConf
from pyiqa.archs.musiq_arch import MUSIQ

HUBCONF = """
import timm, torch

def dino_vitb16(pretrained=True, **kwargs):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    url = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
    model.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu"))
    return model
"""


def main(cache: Path, torch_home: Path) -> None:
    sys.path.insert(0, str(Path.cwd()))
    from vbench.third_party.amt.utils.build_utils import build_from_cfg
    from vbench.third_party.RAFT.core.raft import RAFT

    torch.manual_seed(0)
    dino = cache / "dino_model"
    hub = dino / "facebookresearch_dino_main"
    hub.mkdir(parents=True, exist_ok=True)
    (hub / "hubconf.py").write_text(HUBCONF)
    save({}, dino / "dino_vitbase16_pretrain.pth")
    tiny = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    save(tiny, torch_home / "hub" / "checkpoints" / "dino_vitbase16_pretrain.pth")

    (cache / "clip_model").mkdir(exist_ok=True)
    for name, patch, width in (("ViT-B-32", 32, 512), ("ViT-L-14", 14, 768)):
        clip = CLIP(width, 224, 2, 64, patch, 77, 49408, 64, 1, 2).eval()
        inputs = torch.rand(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
        traced = torch.jit.trace(clip, inputs, check_trace=False)  # clip.load wants an archive
        torch.jit.save(traced, str(cache / "clip_model" / f"{name}.pt"))
    head = torch.nn.Linear(768, 1)
    head.bias.data.fill_(5.0)  # scores are out of 10, and must lie inside
    folder = cache / "aesthetic_model" / "emb_reader"
    save(head.state_dict(), folder / "sa_0_4_vit_l_14_linear.pth")

    config = OmegaConf.load("vbench/third_party/amt/cfgs/AMT-S.yaml").network
    save({"state_dict": build_from_cfg(config).state_dict()}, cache / "amt_model" / "amt-s.pth")
    options = EasyDict(model="", small=False, mixed_precision=False, alternate_corr=False)
    save(RAFT(options).state_dict(), cache / "raft_model" / "models" / "raft-things.pth")
    musiq = MUSIQ(pretrained=False)
    musiq.head.bias.data.fill_(50.0)
    save(musiq.state_dict(), cache / "pyiqa_model" / "musiq_spaq_ckpt-358bb6af.pth")


def save(value: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
