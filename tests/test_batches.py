"""Batches and augmentation, against a loop over single images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomErasing, v2

from certbench.data.augment import Drawn, apply, draw
from certbench.data.batches import Batches
from certbench.data.catalog import DATASETS, DatasetInfo
from certbench.data.dataset import Split, to_pixels
from certbench.errors import UsageError
from certbench.recipe import Augmentation, parse_recipe
from certbench.seeding import derive_seed

CIFAR = DATASETS["cifar10"]
MNIST = DATASETS["mnist"]
CROP = CIFAR.augmentation


def make_split(count: int, info: DatasetInfo = CIFAR) -> Split:
    """Random images, each labelled with its own position."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (count, *info.shape), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count))


def naive(image: torch.Tensor, flip: bool, top: int, left: int, padding: int) -> torch.Tensor:
    if flip:
        image = image.flip(-1)
    padded = torch.nn.functional.pad(image[None].float(), (padding,) * 4, mode="replicate")[0]
    height, width = image.shape[1:]
    return padded[:, top : top + height, left : left + width].to(torch.uint8)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 5, 9)])
@pytest.mark.parametrize("padding", [0, 2, 4])
def test_flip_and_crop_equals_a_loop_over_images(shape: tuple[int, int, int], padding: int) -> None:
    generator = torch.Generator().manual_seed(padding)
    images = torch.randint(0, 256, (64, *shape), dtype=torch.uint8, generator=generator)
    how = Augmentation(flip=True, crop_padding=padding)
    drawn = draw(64, shape[1:], how, generator)
    expected = [
        naive(image, bool(flip), int(top), int(left), padding)
        for image, flip, (top, left) in zip(images, drawn.flips, drawn.offsets, strict=True)
    ]
    assert torch.equal(apply(images, drawn, how), torch.stack(expected))


def test_middle_offset_without_flip_changes_nothing() -> None:
    images = make_split(7).images
    still = Drawn(torch.zeros(7, dtype=torch.bool), torch.full((7, 2), 2))
    assert torch.equal(apply(images, still, CROP), images)


def test_flips_and_offsets_are_uniform_and_independent() -> None:
    count = 50_000
    drawn = draw(count, (32, 32), CROP, torch.Generator().manual_seed(0))
    cells = (drawn.flips.long() * 5 + drawn.offsets[:, 0]) * 5 + drawn.offsets[:, 1]
    observed = torch.bincount(cells, minlength=50).double()
    chi_square = ((observed - count / 50) ** 2 / (count / 50)).sum().item()
    assert chi_square < 94.0  # the 0.9999 quantile with 49 degrees of freedom


def test_flip_setting_does_not_move_the_offsets() -> None:
    still = draw(100, (32, 32), Augmentation(crop_padding=2), torch.Generator().manual_seed(3))
    other = draw(100, (32, 32), CROP, torch.Generator().manual_seed(3))
    assert not still.flips.any()
    assert torch.equal(still.offsets, other.offsets)


@pytest.mark.parametrize(
    ("count", "sizes"), [(12, [4, 4, 4]), (14, [4, 4, 4, 2]), (13, [4, 4, 5]), (3, [3]), (5, [5]), (2, [2])]
)
def test_batch_sizes_never_leave_one_image_alone(count: int, sizes: list[int]) -> None:
    batches = Batches(make_split(count, MNIST), MNIST, 4, 0, True, "cpu")
    assert [len(labels) for _, labels in batches.epoch(0)] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (4, 1)])
def test_too_little_for_a_batch_is_refused(count: int, batch_size: int) -> None:
    with pytest.raises(UsageError, match="at least two images"):
        Batches(make_split(count), CIFAR, batch_size, 0, True, "cpu")


def test_every_image_comes_once_with_its_label() -> None:
    split = make_split(50, MNIST)
    seen = list(Batches(split, MNIST, 8, 0, True, "cpu").epoch(3))
    labels = torch.cat([labels for _, labels in seen])
    pixels = torch.cat([pixels for pixels, _ in seen])
    assert sorted(labels.tolist()) == list(range(50))
    assert labels.tolist() != list(range(50))
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, to_pixels(split.images, 255)[labels])


def test_augmented_batches_hold_the_flips_and_crops_of_their_images() -> None:
    split = make_split(40)
    for pixels, labels in Batches(split, CIFAR, 16, 0, True, "cpu").epoch(0):
        for image, label in zip((pixels * 255).round().to(torch.uint8), labels.tolist(), strict=True):
            variants = (
                naive(split.images[label], flip, top, left, 2)
                for flip in (False, True)
                for top in range(5)
                for left in range(5)
            )
            assert any(torch.equal(image, variant) for variant in variants)


def epoch_of(seed: int, number: int, batch_size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    batches = Batches(make_split(32), CIFAR, batch_size, seed, True, "cpu")
    pixels, labels = zip(*batches.epoch(number), strict=True)
    return torch.cat(pixels), torch.cat(labels)


def test_same_seed_and_epoch_give_the_same_batches_however_often_and_in_whatever_order() -> None:
    batches = Batches(make_split(32), CIFAR, 8, 1, True, "cpu")
    list(batches.epoch(0))
    pixels, labels = zip(*batches.epoch(1), strict=True)
    again_pixels, again_labels = epoch_of(1, 1)
    assert torch.equal(torch.cat(pixels), again_pixels)
    assert torch.equal(torch.cat(labels), again_labels)


def test_order_flips_and_offsets_come_from_the_documented_seeds() -> None:
    split = make_split(32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(derive_seed(7, "shuffle", 2)))
    drawn = draw(32, (32, 32), CROP, torch.Generator().manual_seed(derive_seed(7, "augment", 2)))
    pixels, labels = epoch_of(7, 2)
    assert torch.equal(labels, order)
    augmented = apply(split.images, drawn, CROP)  # drawn per image, in published order
    assert torch.equal(pixels, to_pixels(augmented[order], 255))


def test_batches_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    epoch_of(0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_size_does_not_change_order_or_augmentation() -> None:
    for one, other in zip(epoch_of(0, 0, 8), epoch_of(0, 0, 5), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("seed", "number"), [(0, 1), (1, 0)])
def test_other_epoch_or_seed_gives_another_order_and_augmentation(seed: int, number: int) -> None:
    pixels, labels = epoch_of(0, 0)
    other_pixels, other_labels = epoch_of(seed, number)
    assert not torch.equal(labels, other_labels)
    same = (pixels[labels.argsort()] == other_pixels[other_labels.argsort()]).flatten(1).all(1)
    assert same.float().mean() < 0.5


def test_no_augmentation_on_request_or_where_the_data_set_has_none() -> None:
    split = make_split(16)
    for info, augment in ((CIFAR, False), (replace(CIFAR, flip=False, crop_padding=0), True)):
        for pixels, labels in Batches(split, info, 8, 0, augment, "cpu").epoch(0):
            assert torch.equal(pixels, to_pixels(split.images[labels], 255))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_same_batches() -> None:
    split = make_split(64)
    on_cpu = Batches(split, CIFAR, 16, 0, True, "cpu").epoch(0)
    on_gpu = Batches(split, CIFAR, 16, 0, True, "cuda").epoch(0)
    for (pixels, labels), (gpu_pixels, gpu_labels) in zip(on_cpu, on_gpu, strict=True):
        assert gpu_pixels.device.type == "cuda"
        assert torch.equal(pixels, gpu_pixels.cpu())
        assert torch.equal(labels, gpu_labels.cpu())


# Fills, erasing, and torchvision's own transforms


FULL = Augmentation(
    flip=True,
    crop_padding=4,
    crop_fill=0.5,
    erase=0.5,
    erase_area=(0.04, 0.2),
    erase_aspect=(0.5, 2.0),
    erase_fill=0.25,
)


@pytest.mark.parametrize("fill", [None, 0.0, 0.5])
def test_fixed_parameters_give_what_torchvision_gives(fill: float | None) -> None:
    how = FULL.model_copy(update={"crop_fill": fill})
    generator = torch.Generator().manual_seed(8)
    images = torch.rand(48, 3, 32, 32, generator=generator)
    drawn = draw(48, (32, 32), how, generator)
    assert drawn.erased is not None
    result = apply(images, drawn, how)
    mode = {"padding_mode": "edge"} if fill is None else {"fill": fill}
    for image, flip, (row, column), (top, left, high, wide), found in zip(
        images, drawn.flips, drawn.offsets.tolist(), drawn.erased.tolist(), result, strict=True
    ):
        expected = v2.functional.horizontal_flip(image) if flip else image
        if high:
            expected = v2.functional.erase(expected, top, left, high, wide, torch.tensor(how.erase_fill))
        expected = v2.functional.pad(expected, [4, 4, 4, 4], **mode)
        assert torch.equal(found, v2.functional.crop(expected, row, column, 32, 32))


def test_erasing_moves_neither_flips_nor_offsets() -> None:
    plain = draw(100, (32, 32), CROP, torch.Generator().manual_seed(3))
    erased = draw(100, (32, 32), CROP.model_copy(update={"erase": 0.5}), torch.Generator().manual_seed(3))
    assert torch.equal(plain.flips, erased.flips)
    assert torch.equal(plain.offsets, erased.offsets)
    assert plain.erased is None


def test_erased_rectangles_have_the_distribution_of_torchvisions() -> None:
    count = 4000
    drawn = draw(count, (32, 32), FULL, torch.Generator().manual_seed(0))
    assert drawn.erased is not None
    happens = drawn.erased[:, 2] > 0
    assert abs(int(happens.sum()) - count / 2) < 4 * (count / 4) ** 0.5
    ours = drawn.erased[happens].double()
    torch.manual_seed(1)
    blank = torch.zeros(3, 32, 32)
    theirs = torch.tensor(
        [RandomErasing.get_params(blank, (0.04, 0.2), (0.5, 2.0), [0.0])[:4] for _ in range(len(ours))]
    ).double()
    assert (ours[:, 0] + ours[:, 2] <= 32).all()
    assert (ours[:, 1] + ours[:, 3] <= 32).all()
    for column in range(4):
        found = ks_2samp(ours[:, column].numpy(), theirs[:, column].numpy())
        assert found.pvalue > 1e-4, column


def test_an_image_on_which_no_rectangle_fits_keeps_its_pixels() -> None:
    how = Augmentation(erase=1.0, erase_area=(1.0, 1.0), erase_aspect=(1.0, 1.0))
    drawn = draw(10, (8, 8), how, torch.Generator().manual_seed(0))
    assert drawn.erased is not None
    assert not drawn.erased.any()


def test_a_recipe_may_write_its_own_augmentation() -> None:
    split = make_split(64)
    for pixels, labels in Batches(split, CIFAR, 32, 0, FULL, "cpu").epoch(0):
        assert pixels.dtype == torch.float32
        drawn = draw(64, (32, 32), FULL, torch.Generator().manual_seed(derive_seed(0, "augment", 0)))
        raw = to_pixels(split.images, 255)
        assert torch.equal(pixels, apply(raw, drawn, FULL)[labels])
    with pytest.raises(UsageError, match="resized_crop says nothing"):
        Batches(split, CIFAR, 32, 0, Augmentation(resized_crop=(0.1, 1.0)), "cpu")


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"crop_padding": -1}, "greater than or equal to 0"),
        ({"crop_fill": 255}, "less than or equal to 1"),
        ({"erase_area": [0.5, 0.1]}, "from its lower to its upper end"),
        ({"flipp": True}, "did you mean 'flip'"),
    ],
)
def test_an_augmentation_that_makes_no_sense_is_named(written: dict[str, object], words: str) -> None:
    recipe = {
        "dataset": "cifar10",
        "model": "cnn7",
        "threat": {"radius": "2/255"},
        "method": {"name": "any"},
        "train": {"epochs": 1, "augmentation": written},
    }
    with pytest.raises(UsageError, match=words) as error:
        parse_recipe(recipe, "r")
    assert "train.augmentation" in str(error.value)


def test_no_augmentation_and_one_contradict_each_other() -> None:
    content = {
        "dataset": "cifar10",
        "model": "cnn7",
        "threat": {"radius": "2/255"},
        "method": {"name": "any"},
    }
    train = {"epochs": 1, "augmentation": {"flip": True}}
    assert parse_recipe({**content, "train": train}, "r").train.augmentation == Augmentation(flip=True)
    with pytest.raises(UsageError, match="contradict each other"):
        parse_recipe({**content, "train": {**train, "augment": False}}, "r")
