from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastprompt.data import load_data
from fastprompt.data.augment import apply_seeded, make_augment, widest_part
from fastprompt.data.images import to_tensor


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["flip", "crop", "pgn", "rand-m9-mstd0.5-inc1", "augmix-m5-w2", "flip+rand-m9"])
def test_same_seed_epoch_and_index_give_the_same_image(kind, image):
    augment = make_augment(kind, (24, 24))
    first = [apply_seeded(augment, image, 0, 1, i) for i in range(12)]
    torch.rand(100)
    again = [apply_seeded(augment, image, 0, 1, i) for i in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(out.shape == (3, 24, 24) and out.dtype == torch.uint8 for out in first)
    assert len({out.numpy().tobytes() for out in first}) > 1
    for seed, epoch in ((1, 1), (0, 2)):
        other = [apply_seeded(augment, image, seed, epoch, i) for i in range(12)]
        assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_global_generator_is_left_alone(image):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    apply_seeded(make_augment("pgn", (24, 24)), image, 0, 0, 0)
    assert torch.equal(torch.rand(3), expected)

    def fail(_):
        torch.rand(7)
        raise RuntimeError("a user's function may fail")

    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="may fail"):
        apply_seeded(fail, image, 0, 0, 0)
    assert torch.equal(torch.rand(3), expected)


def test_flip_flips_about_half(image):
    augment = make_augment("flip", (24, 24))
    outs = [apply_seeded(augment, image, 0, 0, i) for i in range(200)]
    flipped = sum(torch.equal(out, image.flip(-1)) for out in outs)
    assert flipped + sum(torch.equal(out, image) for out in outs) == 200
    assert 70 < flipped < 130


def test_crop_shifts_by_at_most_an_eighth():
    dot = torch.zeros(3, 32, 32, dtype=torch.uint8)
    dot[:, 16, 16] = 255
    augment = make_augment("crop", (32, 32))
    places = [apply_seeded(augment, dot, 0, 0, i)[0].nonzero().tolist() for i in range(60)]
    rows = {row for place in places for row, _ in place}
    assert rows <= set(range(12, 21))
    assert len(rows) > 4


def test_pgn_greys_and_solarizes_some():
    colour = torch.stack([torch.full((16, 16), value, dtype=torch.uint8) for value in (200, 60, 20)])
    augment = make_augment("pgn", (16, 16))
    outs = [apply_seeded(augment, colour, 0, 0, i).float() for i in range(200)]
    grey = sum(bool((out[0] == out[1]).all() and (out[1] == out[2]).all()) for out in outs)
    assert 15 < grey < 80
    assert any(out[0].mean() < out[2].mean() for out in outs)


def test_none_own_function_and_unknown_kind():
    assert make_augment("none", (8, 8)) is None
    assert make_augment(torch.neg, (8, 8)) is torch.neg
    with pytest.raises(ValueError, match="augment must be one of 'none', 'flip', 'crop', 'pgn'"):
        make_augment("mixup", (8, 8))
    with pytest.raises(ValueError, match="augment must be in timm's notation, got 'rand-x9'"):
        make_augment("flip+rand-x9", (8, 8))


def test_timms_draws_leave_the_other_generators_alone(image):
    before = random.getstate(), np.random.get_state()[1].tolist()
    outs = [apply_seeded(make_augment("rand-m9-mstd0.5", (24, 24)), image, 0, 0, i) for i in range(8)]
    assert any(not torch.equal(out, image) for out in outs)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert "rand-m9" in repr(make_augment("flip+rand-m9", (24, 24)))  # a run's identity names it


@pytest.mark.parametrize(
    ("height", "width", "exact"),
    [
        (32, 32, True),
        (30, 41, False),
        (20, 90, True),
        (91, 23, True),
        (33, 24, False),
        (40, 50, False),
        (50, 40, False),
    ],
)
def test_the_widest_part_is_what_pgns_random_resized_crop_takes(height, width, exact):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    theirs = v2.RandomResizedCrop(24, scale=(1.0, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    ours = to_tensor(widest_part(image), (24, 24), "squash")
    same = [torch.equal(theirs(image), ours) for _ in range(100)]
    assert all(same) if exact else sum(same) > 80  # else it is off by a line of pixels now and then


def test_only_training_images_are_read_as_pgn_reads_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = torch.randint(0, 256, (20, 90, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    plain, pgn = (load_data(tmp_path, image_size=24, augment=augment) for augment in ("none", "pgn"))
    assert pgn.train.preprocessing == plain.train.preprocessing  # of the images that the model will see
    pgn.train.augment = None
    assert not torch.equal(pgn.train[0][0], plain.train[0][0])
    picture = pgn.train.pool.read(pgn.train.indices[0])
    assert torch.equal(pgn.train[0][0], to_tensor(widest_part(picture), (24, 24), "squash"))
    assert torch.equal(pgn.val[0][0], plain.val[0][0])
