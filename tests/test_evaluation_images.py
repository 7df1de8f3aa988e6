"""Images from anybody's `.npz` or folder: streamed, in order, and refused in one line where they are no images."""

import pickle
import subprocess
import tracemalloc
import zipfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from evaluation_cases import images
from PIL import Image

from vq4dit_jax.errors import InputError
from vq4dit_jax.evaluation import image_batches, open_images
from vq4dit_jax.evaluation.images import checksum


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict:
    """The same 7 images as an array, in compressed and uncompressed files, and in a folder."""
    folder = tmp_path_factory.mktemp("images")
    np.savez(folder / "plain.npz", arr_0=images(7), labels=np.arange(7))
    np.savez_compressed(folder / "compressed.npz", images(7))
    for index, image in enumerate(images(7)):
        path = folder / "pngs" / f"{index // 4}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "pngs" / "recipe.json").write_text("{}")
    return {"array": images(7), **{name: folder / name for name in ("plain.npz", "compressed.npz", "pngs")}}


@pytest.mark.parametrize("name", ["array", "plain.npz", "compressed.npz", "pngs"])
@pytest.mark.parametrize("limit", [None, 1, 5, 7])
@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_batches_are_the_images_in_order(sources, name, limit, batch):
    found = open_images(sources[name], limit)
    expected = images(7)[:limit]
    assert found.shape == expected.shape and len(found) == len(expected)
    for _ in range(2):  # they can be read again
        batches = list(found.batches(batch))
        assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1) and 0 < len(batches[-1]) <= batch
        np.testing.assert_array_equal(np.concatenate(batches), expected)
        assert all(b.dtype == np.uint8 for b in batches)


def test_image_batches_are_those_of_the_set(sources):
    np.testing.assert_array_equal(np.concatenate(list(image_batches(sources["plain.npz"], 2))), images(7))


@hypothesis.given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 10),
    save=st.sampled_from([np.savez, np.savez_compressed]),
)
def test_any_shape_survives(tmp_path_factory, shape, batch, save):
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    path = tmp_path_factory.getbasetemp() / "shape.npz"
    save(path, array)
    np.testing.assert_array_equal(np.concatenate(list(open_images(path).batches(batch))), array)


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    for index, mode in enumerate(("L", "P", "RGBA", "1")):
        Image.new(mode, (4, 4), 0).save(tmp_path / f"{index}.png")
    assert open_images(tmp_path).shape == (4, 4, 4, 3)
    np.testing.assert_array_equal(next(image_batches(tmp_path, 4)), 0)


def test_a_large_file_is_not_loaded(tmp_path):
    path = tmp_path / "large.npz"
    np.savez_compressed(path, np.zeros((4000, 64, 64, 3), np.uint8))  # 49 MB
    tracemalloc.start()
    count = sum(len(batch) for batch in image_batches(path, 20))  # 0.25 MB each
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000 and peak < 2e6


def test_checksum_is_what_sha256sum_prints(sources):
    done = subprocess.run(["sha256sum", sources["plain.npz"]], capture_output=True, text=True, check=True)
    assert checksum(sources["plain.npz"]) == done.stdout.split()[0]
    command = r"find . -name '*.png' | sed 's:^\./::' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    done = subprocess.run(command, shell=True, cwd=sources["pngs"], capture_output=True, text=True, check=True)
    assert checksum(sources["pngs"]) == done.stdout.split()[0]


# What is refused


class _Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _zip_of(path, content: bytes, name: str = "arr_0.npy", **fields) -> None:
    with zipfile.ZipFile(path, "w", **fields) as archive:
        archive.writestr(name, content)


def _with_a_hole(path) -> None:
    """The directory at the end is whole, the data is not."""
    np.savez_compressed(path, images(50))
    data = bytearray(path.read_bytes())
    data[2000:4000] = bytes(2000)
    path.write_bytes(data)


def _one_row_short(path) -> None:
    np.save(path.with_suffix(".npy"), images(9))
    _zip_of(path, path.with_suffix(".npy").read_bytes()[:-192])


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda p: None, "no such file or folder"),
        (lambda p: p.write_bytes(b""), "not readable as .npz"),
        (lambda p: p.write_text("hello"), "not readable as .npz"),
        (lambda p: np.savez(p, images(9).astype(np.float32)), r"float32 \(9, 8, 8, 3\); uint8 \(N, H, W, 3\)"),
        (lambda p: np.savez(p, images(9).astype(np.int64)), "int64"),
        (lambda p: np.savez(p, images(9)[0]), r"uint8 \(8, 8, 3\); uint8 \(N, H, W, 3\)"),
        (lambda p: np.savez(p, images(9)[..., :1]), r"\(9, 8, 8, 1\)"),
        (lambda p: np.savez(p, images(9).transpose(0, 3, 1, 2).copy()), r"\(9, 3, 8, 8\)"),
        (lambda p: np.savez(p, images(0)), r"\(0, 8, 8, 3\)"),
        (lambda p: np.savez(p, np.uint8(3)), r"uint8 \(\)"),
        (lambda p: np.savez(p, np.asfortranarray(images(9))), "np.ascontiguousarray"),
        (
            lambda p: np.savez(p, pictures=images(9), labels=np.arange(9)),
            "no array arr_0 in it; it holds pictures, labels",
        ),
        (lambda p: np.savez(p, np.array([_Malice(p.with_name("ran"))], object)), "pickled"),
        (lambda p: _zip_of(p, pickle.dumps(_Malice(p.with_name("ran")))), "not readable"),
        (lambda p: np.savez(p, images(9)) or p.write_bytes(p.read_bytes()[:-300]), "not readable"),
        (_one_row_short, "should hold 1728 bytes and holds 1536"),
        (_with_a_hole, "not readable"),
    ],
)
def test_what_is_no_file_of_images_is_one_line(tmp_path, write, message):
    path = tmp_path / "images.npz"
    write(path)
    with pytest.raises(InputError, match=message) as caught:
        list(image_batches(path, 4))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "0/0.png").write_bytes(b"no image"), "0/0.png: not readable as an image"),
        (lambda f: (f / "1/6.png").write_bytes((f / "1/6.png").read_bytes()[:60]), "1/6.png: not readable as an image"),
        (lambda f: Image.new("RGB", (16, 8)).save(f / "1/5.png"), "1/5.png: 16x8 pixels, but .*0/0.png has 8x8"),
        (lambda f: [p.unlink() for p in f.rglob("*.png")], "no images in it"),
    ],
)
def test_folders_that_are_none_of_images(sources, tmp_path, spoil, message):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", sources["pngs"], folder], check=True)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        list(image_batches(folder, 4))


@pytest.mark.parametrize("limit", [0, -1, 8])
def test_more_images_than_there_are(sources, limit):
    with pytest.raises(InputError, match=f"{limit} images were asked for, and it has 7"):
        open_images(sources["plain.npz"], limit)
