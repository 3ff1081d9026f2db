import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from psl_flower.app.images import ImageSet, crop_flip
from psl_flower.errors import ConfigError


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (20, 3, 6, 5), dtype=np.uint8), rng.integers(0, 4, 20)


def make(arrays, **kwargs):
    return ImageSet(*arrays, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), **kwargs)


def test_a_batch_is_normalised_channel_by_channel(arrays):
    inputs, targets = make(arrays).get_batch(np.array([7, 3, 7]))
    pixels = arrays[0][[7, 3, 7]] / 255
    expected = (pixels - np.reshape((0.1, 0.2, 0.3), (3, 1, 1))) / np.reshape((0.5, 0.6, 0.7), (3, 1, 1))
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs.numpy(), expected, atol=1e-6)
    assert targets.dtype == torch.int64
    assert targets.tolist() == arrays[1][[7, 3, 7]].tolist()


def test_a_subset_serves_its_own_order(arrays):
    subset = make(arrays, indices=np.array([9, 2, 4]))
    whole = make(arrays)
    assert len(subset) == 3
    assert subset.targets.tolist() == arrays[1][[9, 2, 4]].tolist()
    assert torch.equal(subset.get_batch([2, 0])[0], whole.get_batch([4, 9])[0])


def test_single_fetch_batched_fetch_and_data_loader_agree(arrays):
    dataset = make(arrays)
    inputs, targets = dataset.get_batch(range(20))
    for i in (0, 19, -1):
        assert torch.equal(dataset[i][0], inputs[i])
        assert dataset[i][1] == targets[i]
    loaded = list(DataLoader(dataset, batch_size=8))
    assert torch.equal(torch.cat([x for x, _ in loaded]), inputs)
    assert torch.equal(torch.cat([y for _, y in loaded]), targets)


def test_an_augmentation_in_place_leaves_the_images_as_they_are(arrays):
    before = arrays[0].copy()
    dataset = make(arrays, augment=torch.Tensor.zero_)  # a careless one, in place
    dataset.get_batch(range(20))
    assert np.array_equal(arrays[0], before)


def test_an_empty_subset_has_length_zero(arrays):
    subset = make(arrays, indices=np.array([], dtype=np.int64))
    assert len(subset) == 0
    assert subset.targets.dtype == np.int64


@pytest.mark.parametrize("images", [np.zeros((20, 6, 5), dtype=np.uint8), np.zeros((20, 3, 6, 5))])
def test_images_of_another_shape_or_dtype_are_refused(arrays, images):
    with pytest.raises(ConfigError, match=r"images must be \(M, C, H, W\) uint8"):
        make((images, arrays[1]))


def test_labels_must_be_one_an_image(arrays):
    with pytest.raises(ConfigError, match=r"labels must have shape \(20,\)"):
        make((arrays[0], arrays[1][:-1]))


def test_crop_flip_gives_every_shift_and_mirroring_and_nothing_else():
    image = torch.arange(1, 13, dtype=torch.uint8).view(1, 3, 4)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    shifts = [padded[:, i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
    allowed = {tuple(x.flatten().tolist()) for s in shifts for x in (s, s.flip(-1))}
    torch.manual_seed(0)
    seen = {tuple(x.flatten().tolist()) for x in crop_flip(image.expand(2000, 1, 3, 4))}
    assert seen == allowed


def test_crop_flip_treats_channels_alike():
    gray = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8)
    result = crop_flip(gray.expand(50, 3, 8, 8))
    assert result.dtype == torch.uint8
    assert torch.equal(result[:, 0], result[:, 1])
    assert torch.equal(result[:, 0], result[:, 2])


def test_augmentation_is_a_function_of_torchs_seed(arrays):
    dataset = make(arrays, augment=crop_flip)
    batches = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        batches.append(dataset.get_batch(range(20))[0])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
