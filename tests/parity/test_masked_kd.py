"""Numbers computed by the paper's own code (effl-lab/MaskedKD at 96d052d: its losses, models_student and models_teacher modules).

Both networks are its plain VisionTransformer in float64 with the weights of `fill`; images and labels are those below; the loss is its
DistillationLoss around nn.CrossEntropyLoss, the gradient the norm over all of the student's parameters. None of its code is here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from stillhouse.distillers.supervised.masked_kd import MaskedKD

OFFICIAL = json.loads(Path(__file__).with_name("masked_kd.json").read_text())


def fill(model: nn.Module) -> nn.Module:
    """Weights that are a function of their place in the sorted list of names."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + number).view_as(parameter)
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_((0.3 * wave + one).float())
    return model.double()


def networks() -> tuple[nn.Module, nn.Module]:
    vit = {"img_size": 16, "patch_size": 4, "num_classes": 5}
    student = timm.create_model("vit_tiny_patch16_224", **vit, embed_dim=16, depth=2, num_heads=2)
    teacher = timm.create_model("vit_tiny_patch16_224", **vit, embed_dim=24, depth=3, num_heads=4)
    return fill(student), fill(teacher)


def batch() -> tuple[Tensor, Tensor]:
    images = torch.sin(torch.arange(3 * 3 * 16 * 16, dtype=torch.float64) * 0.13).view(3, 3, 16, 16)
    return images, torch.tensor([0, 3, 1])


@pytest.mark.parametrize("official", OFFICIAL, ids=lambda row: f"{row['targets']}-{row['alpha']}-{row['tau']}-{row['keep']}")
def test_loss_choice_teacher_and_gradient_are_the_official_ones(official: dict[str, Any]) -> None:
    student, teacher = networks()
    settings = {"keep": official["keep"], "alpha": official["alpha"], "targets": official["targets"], "temperature": official["tau"]}
    distiller = MaskedKD(student, teacher, **settings)
    seen: dict[str, Tensor] = {}
    teacher.register_forward_hook(lambda module, inputs, output: seen.update(logits=output))
    loss = torch.stack(list(distiller(batch()).values())).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(official["loss"], abs=1e-6)
    torch.testing.assert_close(seen["logits"], torch.tensor(official["teacher"], dtype=torch.float64), atol=1e-6, rtol=0)
    gradient = torch.cat([parameter.grad.flatten() for parameter in student.parameters() if parameter.grad is not None]).norm()
    assert float(gradient) == pytest.approx(official["grad"], rel=1e-5)
    if official["keep"] < 16:
        shown = distiller.eval().look(batch())["shown"].flatten(1)
        assert [row.nonzero().flatten().tolist() for row in shown] == official["kept"]
