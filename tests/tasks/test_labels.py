"""What labels ask of a student, whatever it is for."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from stillhouse.tasks.labels import AUXILIARY, label_losses, pixel_cross_entropy
from tests.conftest import CLASSES, boxes, images, labels, masks, tiny, tiny_detector, tiny_segmenter


def test_class_labels_are_cross_entropy() -> None:
    network, pictures, classes = tiny(), images(), labels()
    terms = label_losses(network, (pictures, classes))
    torch.testing.assert_close(terms, {"ce": F.cross_entropy(network(pictures), classes)})


def test_pixels_that_do_not_count_do_not() -> None:
    logits, truth = torch.randn(2, CLASSES, 8, 8), torch.randint(CLASSES, (2, 8, 8))
    truth[0, :3] = 255
    kept = truth != 255
    expected = F.cross_entropy(logits.movedim(1, -1)[kept], truth[kept])
    torch.testing.assert_close(pixel_cross_entropy(logits, truth), expected)
    changed = logits.clone()
    changed[0, :, :3] = 7
    torch.testing.assert_close(pixel_cross_entropy(changed, truth), expected)


def test_nothing_counts_means_nothing_is_lost() -> None:
    logits = torch.randn(1, CLASSES, 4, 4, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_coarse_logits_are_judged_on_the_masks_pixels() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 1] = 3.0
    masks_ = torch.ones(1, 8, 8, dtype=torch.long)
    torch.testing.assert_close(pixel_cross_entropy(logits, masks_), F.cross_entropy(torch.tensor([[0.0, 3.0]]), torch.tensor([1])))


def test_an_auxiliary_head_counts_less() -> None:
    network, batch = tiny_segmenter(), (images(), masks())
    logits = network(batch[0])["out"]
    network.register_forward_hook(lambda module, inputs, output: {**output, "aux": logits})
    terms = label_losses(network, batch)
    torch.testing.assert_close(terms["aux"], AUXILIARY * terms["ce"])


def test_a_detectors_own_terms_without_crowds() -> None:
    network, pictures, truth = tiny_detector().train(), list(images().sigmoid()), boxes()
    terms = label_losses(network, (pictures, truth))
    assert set(terms) == {"classification", "bbox_regression"}
    crowded = [
        {"boxes": torch.cat([each["boxes"], torch.tensor([[0.0, 0, 32, 32]])]), "labels": torch.cat([each["labels"], torch.tensor([1])])}
        | {"iscrowd": torch.tensor([False, False, True])}
        for each in truth
    ]
    torch.testing.assert_close(label_losses(network, (pictures, crowded)), terms)
