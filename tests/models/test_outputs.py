"""What a network is known to say, whatever library made it."""

from __future__ import annotations

import pytest
from torch import nn

from stillhouse.models.opening import open_model
from stillhouse.models.outputs import classes_of
from tests.conftest import CLASSES, tiny, tiny_cnn


@pytest.mark.parametrize("spec", ["timm/test_vit", "torchvision/squeezenet1_1", "transformers/vit:hidden_size=16,num_hidden_layers=1"])
def test_how_many_classes_a_network_knows(spec: str) -> None:
    if spec.startswith("transformers"):
        pytest.importorskip("transformers", reason="pip install 'stillhouse[transformers]'")
        spec += ",num_attention_heads=2,intermediate_size=16,image_size=32"
    assert classes_of(open_model(spec, classes=7, channels=3, weights="random")) == 7


def test_of_modules() -> None:
    assert classes_of(tiny()) == classes_of(tiny_cnn()) == CLASSES
    assert classes_of(tiny(num_classes=0)) is None
    assert classes_of(nn.Linear(3, 4)) is None
