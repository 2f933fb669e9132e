"""Images in parts: which may join, what a late part reads, and that parts change nothing but memory."""

from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nestify.schedule import refit as refitting
from nestify.schedule.parted_calls import FEWEST, PartedCalls, images_ahead, part_images
from nestify.schedule.refit import refit
from tests.schedule.test_refit import one_layer


def net() -> nn.Sequential:
    """A network whose layers read 3 x 8 x 8, 4 x 8 x 8, 2 x 4 x 4 and 32 numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 2, 2, stride=2),
        nn.Conv2d(2, 2, 1),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()


def test_room_is_that_of_the_largest_layer_ahead() -> None:
    """The second layer reads 256 numbers of an image, those after it 32."""
    assert images_ahead(net(), torch.zeros(1, 3, 8, 8), 2560) == [10, 10, 80, 80]


def test_a_part_that_joins_late_has_passed_the_layers_as_they_are_then() -> None:
    network, images = net(), torch.randn(24, 3, 8, 8)
    runs = PartedCalls(network, part_images(images, 8), batch_statistics=False)
    with closing(runs):
        assert runs.advance()
        assert (runs.images, runs.next_part) == (8, 8)
        with torch.no_grad():
            network[0].weight.mul_(2)  # type: ignore[operator]
        assert runs.advance()
        runs.join()
        runs.join()
        assert (runs.images, runs.next_part) == (24, 0)
        with torch.no_grad():
            expected = network[:2](images)
        torch.testing.assert_close(torch.cat([call.inputs for call in runs.calls]), expected)
        assert runs.advance()
        with torch.no_grad():
            expected = network[:3](images)
        torch.testing.assert_close(torch.cat([call.inputs for call in runs.calls]), expected)
        assert runs.advance()
        assert not runs.advance()
        assert not runs.calls


@given(st.integers(1, 50), st.integers(0, 60))
def test_parts_are_the_images_in_order(count: int, first: int) -> None:
    images = torch.arange(count).view(count, 1, 1, 1)
    parts = part_images(images, first)
    assert torch.equal(torch.cat(parts), images)
    assert all(len(part) == max(FEWEST, first) for part in parts[:-1])
    assert len(parts) == 1 or len(parts[-1]) >= FEWEST


def weights_after(images: Tensor, room: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    torch.manual_seed(0)
    nested = one_layer(groups=1)
    with monkeypatch.context() as changed:
        if room is not None:
            changed.setattr(refitting, "images_ahead", lambda *_: room)
            changed.setattr(refitting, "part_images", lambda images, _: part_images(images, 8))
        refit(nested, images)
    return nested.shared_tensor("0.weight").detach()


def test_parts_that_all_join_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions of the layer are used, so its sums are the same in another order."""
    images = torch.randn(30, 3, 6, 5)
    torch.testing.assert_close(
        weights_after(images, [30], monkeypatch), weights_after(images, None, monkeypatch)
    )


def test_without_room_the_first_part_alone_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(30, 3, 6, 5)
    torch.testing.assert_close(
        weights_after(images, [8], monkeypatch), weights_after(images[:8], None, monkeypatch)
    )


def test_layers_read_no_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution runs on eight images at a time, also on those that join later."""
    largest: list[int] = []

    class Watched(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            largest.append(len(x))
            return super().forward(x)

    network = nn.Sequential(Watched(3, 4, 3, padding=1), Watched(4, 4, 8), Watched(4, 4, 1)).eval()
    room = images_ahead(network, torch.zeros(1, 3, 8, 8), 8 * 256)
    assert room == [8, 8, 512]
    largest.clear()
    runs = PartedCalls(network, part_images(torch.randn(32, 3, 8, 8), room[0]), batch_statistics=False)
    with closing(runs):
        while runs.advance():
            while runs.next_part and runs.images + runs.next_part <= room[runs.passed - 1]:
                runs.join()
    assert set(largest) == {8}
    assert len(largest) == 12
