"""Plain training."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from stillhouse.distillers.classics.scratch import Scratch
from tests.conftest import images, labels, tiny


def test_it_is_cross_entropy_and_needs_no_teacher() -> None:
    student = tiny()
    distiller = Scratch(student)
    terms = distiller((images(), labels()))
    assert list(terms) == ["ce"]
    assert torch.equal(terms["ce"], F.cross_entropy(student(images()), labels()))
    assert distiller.teacher is None
    assert distiller.look((images(), labels())) == {}
