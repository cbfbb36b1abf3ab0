"""What is measured of generated images: by hand, against torchmetrics, and in whose eyes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stillhouse.errors import UserError
from stillhouse.models.preprocessing import Preprocessing, set_preprocessing
from stillhouse.models.sampling import FlowNetwork
from stillhouse.tasks import generate
from stillhouse.tasks.generate import Generate, frechet_distance, neighbourhoods, pictures
from tests.conftest import tiny_cnn

NAMES = ["dark", "bright"]
SHAPE = (1, 4, 4)


class Judge(nn.Module):
    """Sees how bright an image is; its features are four pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images[:, 0, :2, :2].flatten(1))


class Painter(nn.Module):
    """The velocity that leads to an image of the class in one step, as dark or bright as it is asked for."""

    def __init__(self, shades: tuple[float, float]) -> None:
        super().__init__()
        self.shades = nn.Parameter(torch.tensor(shades))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return (x - self.shades[labels].view(-1, 1, 1, 1)) / sigma.view(-1, 1, 1, 1)


def painter(*shades: float) -> FlowNetwork:
    return FlowNetwork(Painter(shades), SHAPE, 2, null=False)  # type: ignore[arg-type]


def metric(**settings: Any) -> Generate:
    return Generate(NAMES, judge=Judge(), **settings)


def some(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, *SHAPE), generator=torch.Generator().manual_seed(seed)).byte()


def test_neighbourhoods_by_hand() -> None:
    """On a line: real at 0, 1, 2, 3 with k = 1 (each ball reaches 1), made at 0.5, 10 and 11."""
    real, made = torch.arange(4.0)[:, None], torch.tensor([[0.5], [10.0], [11.0]])
    found = neighbourhoods(real, made, neighbours=1)
    assert found["coverage"] == 2 / 4  # 0.5 lies in the balls of 0 and 1
    assert found["precision"] == 1 / 3
    assert found["recall"] == 1.0  # the ball around 0.5 reaches to 10


def test_the_same_distribution_is_covered_and_another_is_not() -> None:
    same, far = neighbourhoods(some(400, 0), some(400, 1)), neighbourhoods(some(400, 0), some(400, 1, shift=20))
    assert same["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)  # 1 - (1/2)^k, Naeem et al., section 4
    assert same["precision"] > 0.8
    assert same["recall"] > 0.8
    assert far == {"coverage": 0.0, "precision": 0.0, "recall": 0.0}
    itself = neighbourhoods(some(100, 0), some(100, 0))
    assert itself == {"coverage": 1.0, "precision": 1.0, "recall": 1.0}


def test_one_mode_of_two_is_precise_and_covers_half() -> None:
    real = torch.cat([some(200, 0), some(200, 1, shift=30)])
    found = neighbourhoods(real, some(400, 2))
    assert found["precision"] > 0.8
    assert found["coverage"] == pytest.approx(0.5, abs=0.03)
    assert found["recall"] <= 0.5


def test_it_does_not_matter_how_many_rows_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = neighbourhoods(some(150, 0), some(130, 1, shift=0.5))
    monkeypatch.setattr(generate, "ROWS", 37)
    assert neighbourhoods(some(150, 0), some(130, 1, shift=0.5)) == whole


def test_fewer_pictures_than_neighbours_are_no_error() -> None:
    assert neighbourhoods(some(2, 0), some(2, 0))["coverage"] == 1.0


class Features(nn.Module):
    num_features = 6

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1)[:, :6].double()


def test_the_frechet_distance_is_torchmetrics() -> None:
    theirs = FrechetInceptionDistance(feature=Features())
    real, made = (torch.randint(256, (60, 3, 1, 2), generator=torch.Generator().manual_seed(seed)).byte() for seed in (0, 1))
    theirs.update(real, real=True)
    theirs.update(made // 2, real=False)
    ours = frechet_distance(real.flatten(1).double(), (made // 2).flatten(1).double())
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-4)


def test_the_frechet_distance_of_normals_in_closed_form() -> None:
    features = some(500, 0).double()
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(features, features + 2) == pytest.approx(6 * 4, rel=1e-6)
    centred = features - features.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * centred.T.cov().trace().item(), rel=1e-6)
    assert frechet_distance(some(3, 0), some(3, 1)) >= 0  # fewer than there are features


def test_one_image_is_made_of_each_target_and_all_are_compared_as_pictures() -> None:
    network, seen = painter(-0.5, 0.5), metric()
    targets, truth = torch.tensor([0, 1, 1, 0]), torch.rand(4, *SHAPE) * 2 - 1
    output = seen.ask(network, truth, targets)
    assert output["samples"].dtype == torch.uint8
    assert output["samples"][:, 0, 0, 0].tolist() == [64, 191, 191, 64]
    assert torch.equal(output["images"], ((truth + 1) / 2 * 255).round().byte())
    seen.update(output, targets)
    found = seen.compute()
    assert found["class_accuracy"] == 1.0
    assert {name for name in found if "/" not in name} == set(Generate.titles)


def test_the_class_is_what_the_judge_sees() -> None:
    seen, targets = metric(), torch.tensor([0, 0, 1, 1])
    seen.update(seen.ask(painter(0.9, 0.9), torch.zeros(4, *SHAPE), targets), targets)
    found = seen.compute()
    assert found["class_accuracy"] == 0.5
    assert found["accuracy/dark"] == 0.0
    assert found["accuracy/bright"] == 1.0


def test_both_sides_normalisation_is_undone() -> None:
    network, judge = painter(1.0, 2.0), Judge()
    set_preprocessing(network, Preprocessing((0.25,), (0.25,), 4))
    set_preprocessing(judge, Preprocessing((0.1,), (2.0,), 4))
    seen = Generate(NAMES, judge=judge)
    output = seen.ask(network, torch.zeros(2, *SHAPE), torch.tensor([0, 1]))
    assert output["samples"][:, 0, 0, 0].tolist() == [128, 191]
    assert (output["images"] == 64).all()
    _, features = seen.judged_by(output["samples"])
    assert features[:, 0].tolist() == pytest.approx([(128 / 255 - 0.1) / 2, (191 / 255 - 0.1) / 2])


def test_pictures_are_what_can_be_shown() -> None:
    assert pictures(torch.tensor([[[[-9.0, 9.0]]]]), None).tolist() == [[[[0, 255]]]]


def test_batches_add_up_and_the_judge_stays_frozen() -> None:
    whole, parts, targets = metric(), metric(), torch.arange(40) % 2
    output = {"samples": images(40, 1), "images": images(40)}
    whole.update(output, targets)
    for rows in torch.arange(40).split(13):
        parts.update({name: each[rows] for name, each in output.items()}, targets[rows])
    assert whole.compute() == pytest.approx(parts.compute())
    assert not any(parameter.requires_grad for parameter in whole.judge.parameters())
    assert not whole.judge.training
    one = metric()
    one.update({name: each[:1] for name, each in output.items()}, targets[:1])
    with pytest.raises(UserError, match="1 pictures were measured, expected at least two"):
        one.compute()


def test_any_classifier_can_judge() -> None:
    """A convolutional network of timm, with images resized to its size; its features are what its last layer is given."""
    judge = tiny_cnn()
    seen = Generate(["a", "b", "c", "d", "e"], judge=judge)
    pictures = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    logits, features = seen.judged_by(pictures)
    assert logits.shape == (6, 5)
    assert features.shape == (6, judge.num_features)
    assert torch.allclose(judge.get_classifier()(features), logits, atol=1e-5)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(UserError, match="tells 2 classes apart and the data has 3"):
        Generate(["a", "b", "c"], judge=Judge())
    with pytest.raises(UserError, match="a Conv2d makes no images"):
        metric().ask(nn.Conv2d(1, 1, 1), torch.zeros(2, *SHAPE), torch.tensor([0, 1]))


def test_what_was_made_is_drawn_in_place_of_the_images() -> None:
    output = {"samples": images(3, 1), "images": images(3)}
    assert torch.equal(Generate.draw(output["images"], output, NAMES), images(3, 1).expand(-1, 3, -1, -1))
    assert torch.equal(Generate.draw(output["images"], torch.tensor([0, 1, 0]), NAMES), images(3).expand(-1, 3, -1, -1))


def test_the_headline_is_better_when_larger_and_chance_is_below_it() -> None:
    good, bad, targets = metric(), metric(), torch.arange(60) % 2
    good.update({"samples": images(60, 1), "images": images(60)}, targets)
    bad.update({"samples": torch.full((60, *SHAPE), 255).byte(), "images": images(60)}, targets)
    assert good.compute()[Generate.headline] > bad.compute()[Generate.headline] >= bad.chance
