"""What grows with the number of pictures lies on disk, and a full disk is said."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dataset_files import encoded, make_zip
from PIL import Image

from adapters.files.atomic import FULL
from families.loading import load_family
from trainer.data.dataset import read_dataset
from trainer.data.mapped_file import MappedFile, NoSpace
from trainer.learning.features import Captions, encode_images
from trainer.learning.mapped_tensors import Tensors
from trainer.settings.fields import Settings


def test_tensors_come_back_as_they_were() -> None:
    whole = torch.randn(3, 5, 7)
    given = {"float32": whole, "a part": whole[:, 1:3], "bfloat16": whole.bfloat16().mT}
    given |= {"one number": torch.tensor(3), "with a gradient": whole.clone().requires_grad_()}
    tensors = Tensors[str]("numbers")
    for name, value in given.items():
        tensors.add(name, value)
    for name, value in tensors.mapped().items():
        assert value.dtype == given[name].dtype
        assert value.equal(given[name].detach())
    assert Tensors[int]("nothing").mapped() == {}
    assert MappedFile("nothing").mapped() == b""


def test_what_is_kept_of_each_picture_lies_on_disk(small: Callable[..., Settings]) -> None:
    settings = small(resolution="32,64")
    family = load_family(settings.base)
    examples = read_dataset(settings.dataset, settings.default_caption)
    samples = encode_images(family, examples, settings)
    captions = [each.caption for each in samples]
    kept = [each for sample in samples for each in (sample.mean_CHW, sample.std_CHW)]
    kept += Captions(family, captions).features(captions)
    kept += [torch.frombuffer(each.data, dtype=torch.uint8) for each in examples]

    places = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("(deleted)"):  # a file that has no name any more
            places.append([int(edge, 16) for edge in re.split("[- ]", line)[:2]])
    for tensor in kept:
        start = tensor.data_ptr()
        assert any(first <= start and start + tensor.nbytes <= last for first, last in places)


def test_a_full_disk_is_said_and_what_to_do(
    tmp_path: Path, fill_the_disk: Callable[[], None]
) -> None:
    noise = encoded(Image.effect_noise((400, 400), 99))
    path = make_zip(tmp_path / "set.zip", {"a.png": noise})
    latents = Tensors[int]("latents")
    fill_the_disk()
    with pytest.raises(NoSpace, match="of images in /.*set TMPDIR to a folder") as error:
        read_dataset(path, "a photo")
    assert error.value.errno in FULL
    with pytest.raises(NoSpace, match="of latents in /.*set TMPDIR to a folder"):
        for number in range(26):  # of 4 kB each, so that some wait to be written
            latents.add(number, torch.zeros(1000))
        latents.mapped()
