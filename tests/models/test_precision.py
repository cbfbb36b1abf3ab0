"""A frozen network in low precision: what it answers, what it keeps of the network, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.losses.logits import kl_divergence
from stillhouse.measure.flops import macs
from stillhouse.models import int8_blocks
from stillhouse.models.int8_blocks import Int8Block
from stillhouse.models.precision import count_parameters, lowered, with_torchao
from stillhouse.models.taps import Tap
from stillhouse.models.tokens import OnSomeTokens
from tests.conftest import CLASSES, SIDE, images, tiny, tiny_cnn

CPU = torch.device("cpu")
BF16 = 2.0**-8
"""Half of bf16's grain: OpenVINO computes what is between the int8 products in bf16 where the CPU can."""


@pytest.fixture(scope="module")
def openvino() -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    if not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU has neither VNNI nor AMX")


@pytest.fixture(scope="module")
def in_int8(openvino: None) -> nn.Module:
    torch.set_num_threads(1)
    return lowered(tiny(embed_dim=48), "int8", CPU)[0]


def test_fp32_is_the_very_same_network() -> None:
    network = tiny()
    assert lowered(network, "fp32", CPU) == (network, "torch")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_network_itself_stays_what_it_is(precision: str, request: pytest.FixtureRequest) -> None:
    if precision == "int8":
        request.getfixturevalue("openvino")
    network = tiny()
    state, answer = copy.deepcopy(network.state_dict()), network(images())
    low, _ = lowered(network, precision, CPU)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(network(images()), answer)
    assert not any(parameter.requires_grad for parameter in low.parameters())
    assert not any(module.training for module in low.modules())
    assert count_parameters(low) == count_parameters(network)
    assert macs(low, (3, SIDE, SIDE)) == macs(network, (3, SIDE, SIDE))
    assert macs(low, (3, SIDE, SIDE), keep=8) == macs(network, (3, SIDE, SIDE), keep=8)


def test_bf16_is_the_network_cast_whichever_module_is_entered() -> None:
    network = tiny()
    low, by = lowered(network, "bf16", CPU)
    plain = copy.deepcopy(network).to(torch.bfloat16)
    assert by == "torch"
    assert torch.equal(low(images()), plain(images().bfloat16()))
    tokens = torch.randn(2, 7, 32)
    assert torch.equal(low.blocks[1].mlp(tokens), plain.blocks[1].mlp(tokens.bfloat16()))


class Weighs(nn.Module):
    """A network whose only block is one linear layer on tokens [B, 16, 64], cut from images [B, 1, 32, 32]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, len(weight), bias=False)])
        self.conv = nn.Conv2d(1, 1, 1)
        self.pretrained_cfg = {"mean": (0.5,), "std": (0.5,), "input_size": (1, 32, 32)}
        self.blocks[0].weight.data = weight

    def forward(self, pictures: Tensor) -> Tensor:
        return self.blocks[0](pictures.flatten(1).unflatten(1, (16, 64)))


def whole_numbers(*shape: int) -> Tensor:
    """Whole numbers in [-127, 127], with a 127 in each row, so that int8 holds them as they are."""
    numbers = torch.randint(-127, 128, shape).float()
    numbers[..., 0] = 127
    return numbers


@pytest.mark.usefixtures("openvino")
def test_int8_is_exact_where_weights_and_activations_are() -> None:
    weight = whole_numbers(32, 64) * 2.0 ** torch.randint(-9, 3, (32, 1))
    network = Weighs(weight)
    tokens = whole_numbers(3 * 16, 64) * 2.0 ** torch.randint(-9, 3, (3 * 16, 1))  # a scale of its own for each token and channel
    pictures = tokens.reshape(3, 1, 32, 32)
    with torch.no_grad():
        found, exact = lowered(network, "int8", CPU)[0](pictures), network(pictures)
    torch.testing.assert_close(found, exact, rtol=BF16, atol=0)


@pytest.mark.usefixtures("openvino")
def test_int8_errs_by_what_rounding_to_bytes_explains() -> None:
    """Each of the two factors is off by at most half a step of its row; bf16 rounds the result."""
    network = Weighs(torch.randn(32, 64))
    pictures = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        found, exact = lowered(network, "int8", CPU)[0](pictures), network(pictures)
        x, w = pictures.reshape(48, 64).abs(), network.blocks[0].weight.abs()
        step_x, step_w = x.amax(1) / 127 / 2, w.amax(1) / 127 / 2
        most = step_x[:, None] * w.sum(1) + x.sum(1)[:, None] * step_w + 64 * step_x[:, None] * step_w
        error = (found - exact).reshape(48, 32).abs()
    assert (error <= 1.01 * most + BF16 * exact.reshape(48, 32).abs()).all()
    assert error.max() > 0.01 * most.max(), "int8 products were not computed at all"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_the_last_block_computes_what_is_read_of_it(openvino: None, name: str) -> None:
    """The answer is the same to rounding, whoever looks at a layer sees all its tokens, and so does who asks for features."""
    low, _ = lowered(tiny(name, embed_dim=48), "int8", CPU)
    answered: list[tuple[int, ...]] = []
    last: Any = low.blocks[-1]
    infer = last.prefix_request.infer
    last.prefix_request = SimpleNamespace(infer=lambda *given, **named: answered.append(given[0][0].shape) or infer(*given, **named))
    with torch.no_grad():
        alone = low(images())
        assert len(answered) == 1
        everything = low.forward_features(images())
        for layer in ("blocks.1", "norm", "blocks"):
            watched = copy.deepcopy(low)
            tap = Tap(watched, layer)
            torch.testing.assert_close(watched(images()), alone, rtol=0.02, atol=0.02)
            assert tap.take().shape == everything.shape
    assert everything.shape[1] == low.num_prefix_tokens + 16 == answered[0][1]
    assert len(answered) == 1


def test_the_last_block_computes_all_where_all_is_read(openvino: None) -> None:
    low: Any = lowered(tiny(embed_dim=48, global_pool="avg"), "int8", CPU)[0]
    assert low.blocks[-1].of_prefix is None
    assert low(images()).shape == (len(images()), CLASSES)


def test_patches_are_embedded_in_bf16_where_the_cpu_can(in_int8: nn.Module) -> None:
    exact, dtype = tiny(embed_dim=48).patch_embed.proj, torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    found, pictures = in_int8.patch_embed.proj(images()), images().to(dtype)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact.to(dtype)(pictures).float())


def test_int8_answers_nearly_the_same_and_always_the_same(in_int8: nn.Module) -> None:
    full = tiny(embed_dim=48)
    with torch.no_grad():
        found = in_int8(images())
        assert kl_divergence(found, full(images())) < 1e-3
        assert not torch.equal(found, full(images()))
        assert torch.equal(found, in_int8(images()))
        assert torch.equal(found, copy.deepcopy(in_int8)(images()))


def test_an_image_is_answered_alike_whatever_stands_beside_it(in_int8: nn.Module) -> None:
    """Scales are found token by token; only the order of sums may differ."""
    pictures = torch.cat([images(4), 100 * images(4)])
    with torch.no_grad():
        together, alone = in_int8(pictures), torch.cat([in_int8(each) for each in pictures.split(1)])
    torch.testing.assert_close(together[:4], in_int8(pictures[:4]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_masked_teacher_is_the_lowered_one_on_the_gathered_tokens(precision: str, request: pytest.FixtureRequest) -> None:
    low = copy.deepcopy(request.getfixturevalue("in_int8")) if precision == "int8" else lowered(tiny(embed_dim=48), "bf16", CPU)[0]
    keep, every = torch.rand(2, 16).topk(6).indices, torch.arange(16).expand(2, -1)
    with torch.no_grad():
        tokens = low._pos_embed(low.patch_embed(images()))
        gathered = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, keep[..., None].expand(-1, -1, 48))], 1)
        expected, whole = low.forward_head(low.norm(low.blocks(gathered))), low(images())
        some = OnSomeTokens(low)
        tolerance = {"rtol": 0.05, "atol": 0.05} if precision == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(some(images(), keep), expected, **tolerance)
        torch.testing.assert_close(some(images(), every), whole, **tolerance)


def test_whole_blocks_can_be_tapped_and_parts_of_them_not(in_int8: nn.Module) -> None:
    low = copy.deepcopy(in_int8)
    tap = Tap(low, "blocks.0")
    with torch.no_grad():
        low(images())
    assert tap.take().shape == (2, 17, 48)
    with pytest.raises(UserError, match=r"no layer 'blocks\.0\.attn'"):
        Tap(low, "blocks.0.attn")


def test_no_gradient_passes_in_int8(in_int8: nn.Module) -> None:
    with pytest.raises(UserError, match="no gradient can pass"):
        in_int8(images().requires_grad_())


@pytest.mark.usefixtures("openvino")
def test_networks_without_such_blocks_are_told_why() -> None:
    with pytest.raises(UserError, match=r"most of its weights are not in linear layers.*bf16"):
        lowered(tiny_cnn(), "int8", CPU)
    with pytest.raises(UserError, match=r"rotary positions.*bf16"):
        lowered(tiny("eva02_tiny_patch14_224"), "int8", CPU)


def test_machines_that_cannot_are_told_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("fp16", "fp8"):
        with pytest.raises(UserError, match=f"in {precision} needs a CUDA GPU"):
            lowered(tiny(), precision, CPU)
    with pytest.raises(UserError, match="expected one of fp32, bf16"):
        lowered(tiny(), "int4", CPU)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    with pytest.raises(UserError, match=r"pip install 'stillhouse\[low-precision\]'"):
        lowered(tiny(), "int8", CPU)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(UserError, match="neither VNNI nor AMX"):
        lowered(tiny(), "int8", CPU)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"torchao's: pip install"):
        with_torchao(tiny(), "int8")


def test_other_blocks_in_int8(openvino: None) -> None:
    """transformers' layers, and timm's with a distillation token and layer scale."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=SIDE, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=CLASSES
    )
    for network in (transformers.ViTForImageClassification(config).eval(), tiny("deit3_small_patch16_224", depth=1)):
        low, _ = lowered(network, "int8", CPU)
        assert any(isinstance(module, Int8Block) for module in low.modules())
        with torch.no_grad():
            found, full = (getattr(each(images()), "logits", each(images())) for each in (low, network))
        assert kl_divergence(found, full) < 1e-3


@pytest.mark.filterwarnings("ignore")
def test_what_runs_on_gpus_answers_nearly_the_same_without_one() -> None:
    """torchao's int8 on this CPU: the same code path, slowly."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    network = tiny(embed_dim=48)
    low = with_torchao(copy.deepcopy(network).requires_grad_(False), "int8")
    with torch.no_grad():
        assert kl_divergence(low(images()), network(images())) < 1e-3


def test_the_outermost_lists_are_the_blocks() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    network = nn.ModuleDict({"stages": nn.ModuleList([nn.Sequential(inner), nn.Identity()]), "head": nn.Linear(2, 2)})
    assert [name for name, _ in int8_blocks._blocks(network)] == ["stages.0"]
    assert [name for name, _ in int8_blocks._blocks(inner)] == ["0"]


def test_a_signal_does_not_end_the_process_after_a_network_in_int8() -> None:
    """OpenVINO leaves behind a stack for signal handlers that it has freed."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    work = """
import gc, signal, torch
from stillhouse.models.precision import lowered
from tests.conftest import images, tiny
seen = []
signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
low, _ = lowered(tiny(), "int8", torch.device("cpu"))
low(images())
signal.raise_signal(signal.SIGINT)
del low
gc.collect()
signal.raise_signal(signal.SIGINT)
assert len(seen) == 2
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", work], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
