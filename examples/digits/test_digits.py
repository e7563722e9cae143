"""Runs the program `digits` (its path is in the environment variable DIGITS): against PyTorch's samples, against a
classifier, its picture pixel by pixel, and on bad input."""

import json
import os
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
REFERENCE = HERE / "reference.safetensors"
MEMBERS = ["FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN", "FLASHINFER_ATTN"]
# On pixels 0 ... 16: PyTorch's own samples on a CPU and on a GPU differ by 1.2e-4.
TOLERANCE = 1e-3
QUANTIZED = {"SAGE_ATTN", "SAGE_ATTN_3"}  # inexact by design: only the classifier judges them


def digits(folder: Path, *args, **more) -> subprocess.CompletedProcess:
    return subprocess.run([os.environ["DIGITS"], *map(str, args)], cwd=folder, text=True,
                          capture_output=True, timeout=250, **more)


def flags(backends: list[str]) -> list[str]:
    return [word for name in backends for word in ("--backend", name)]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """The members that do not compute on this machine's CPU: exit status and reason."""
    folder = tmp_path_factory.mktemp("refusals")
    results = {name: digits(folder, "--backend", name, "--count", 1, "--steps", 1) for name in MEMBERS}
    refused = {name: (result.returncode, result.stderr) for name, result in results.items() if result.returncode != 0}
    for name, (status, reason) in refused.items():
        assert status == 3 or (status == 4 and "does not support device=cpu" in reason), (name, status, reason)
        assert name not in ("FLASH_ATTN", "TORCH_SDPA", *QUANTIZED), (name, status, reason)
    return refused


@pytest.fixture(params=MEMBERS)
def member(request, refusals) -> str:
    """Each of the others, in a test of its own that bears its name."""
    if request.param in refusals:
        pytest.skip(refusals[request.param][1].strip())
    return request.param


# --- right samples -----------------------------------------------------------------------------------------------

def test_samples_are_those_of_pytorch(member, tmp_path):
    result = digits(tmp_path, "--backend", member, "--noise", REFERENCE, "--samples", "s.safetensors")
    assert result.returncode == 0, result.stderr
    expected, found = load_file(REFERENCE), load_file(tmp_path / "s.safetensors")
    assert np.array_equal(found["labels"], expected["labels"])
    assert np.array_equal(found["noise"], expected["noise"])
    difference = np.abs(found["samples"] - expected["samples"]).max()
    print(f"{member}: largest difference to PyTorch {difference:.2e}")
    assert difference < TOLERANCE or member in QUANTIZED


def test_no_backend_does_anothers_work(tmp_path):
    names = ["FLASH_ATTN", "TORCH_SDPA"]
    result = digits(tmp_path, *flags(names), "--count", 2, "--steps", 4, "--samples", "s.safetensors")
    assert result.returncode == 0, result.stderr
    flash, sdpa = (load_file(tmp_path / f"s-{name}.safetensors")["samples"] for name in names)
    assert not np.array_equal(flash, sdpa)  # two engines never round alike


def test_samples_read_as_the_digits_asked_for(member, tmp_path):
    result = digits(tmp_path, "--backend", member, "--seed", 1, "--count", 50, "--samples", "s.safetensors")
    assert result.returncode == 0, result.stderr
    score = subprocess.run([sys.executable, "-B", HERE / "score.py", tmp_path / "s.safetensors", "--min-agreement", "0.95"],
                           text=True, capture_output=True)
    print(member, score.stdout)
    assert score.returncode == 0, (score.stdout, score.stderr)


def test_seed_and_options_matter_and_repeat(tmp_path):
    def samples(*args):
        result = digits(tmp_path, "--backend", "flash_attn", "--count", 2, "--samples", "s.safetensors", *args)
        assert result.returncode == 0, result.stderr
        return load_file(tmp_path / "s.safetensors")["samples"]

    first = samples("--steps", 4)
    assert np.array_equal(first, samples("--steps", 4, "--seed", 0, "--guidance", 2))
    for other in (("--steps", 5), ("--steps", 4, "--seed", 1), ("--steps", 4, "--guidance", 1.5)):
        assert np.abs(first - samples(*other)).max() > 0.01, other


def test_default_backend_is_the_selectors(tmp_path):
    small = ("--count", 1, "--steps", 1)
    assert "FLASH_ATTN" in digits(tmp_path, *small).stdout
    chosen = os.environ | {"DIFFUSION_ATTENTION_BACKEND": "torch_sdpa"}
    assert "TORCH_SDPA" in digits(tmp_path, *small, env=chosen).stdout
    unknown = digits(tmp_path, *small, env=os.environ | {"DIFFUSION_ATTENTION_BACKEND": "nope"})
    assert unknown.returncode == 2 and "'NOPE'" in unknown.stderr


# --- capture -----------------------------------------------------------------------------------------------------

def test_capture_repeats_the_shipped_one(tmp_path):
    shipped = load_file(HERE / "capture.safetensors")
    cases = {name.rsplit(".", 1)[0] for name in shipped}
    assert cases == {f"digits t={t}" for t in ("0.95", "0.65", "0.35", "0.05")}
    result = digits(tmp_path, "--backend", "FLASH_ATTN", "--seed", 0, "--count", 1, "--capture", "c.safetensors")
    assert result.returncode == 0, result.stderr
    again = load_file(tmp_path / "c.safetensors")
    assert again.keys() == shipped.keys()
    for name, tensor in shipped.items():
        assert tensor.shape == (6, 64, 3, 64) and tensor.dtype == np.float32
        assert np.abs(tensor - again[name]).max() < TOLERANCE, name
    assert len({tensor.tobytes() for tensor in shipped.values()}) == len(shipped)
    with safe_open(tmp_path / "c.safetensors", "numpy") as file:
        assert "--backend FLASH_ATTN --seed 0" in file.metadata()["made_by"]


# --- the picture -------------------------------------------------------------------------------------------------

def read_grey_png(file: Path) -> np.ndarray:
    """Decodes an 8-bit grey PNG without interlacing, by the specification: nothing of libpng."""
    raw = file.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(raw):
        length, kind = int.from_bytes(raw[at:at + 4]), raw[at + 4:at + 8]
        assert zlib.crc32(raw[at + 4:at + 8 + length]) == int.from_bytes(raw[at + 8 + length:at + 12 + length])
        chunks.append((kind, raw[at + 8:at + 8 + length]))
        at += 12 + length
    assert chunks[0][0] == b"IHDR" and chunks[-1][0] == b"IEND"
    header = chunks[0][1]
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    assert tuple(header[8:]) == (8, 0, 0, 0, 0)
    data = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
    rows = np.frombuffer(data, np.uint8).reshape(height, width + 1)
    image = np.zeros((height, width), np.uint8)
    above = np.zeros(width, int)
    for y, row in enumerate(rows):
        image[y] = above = unfiltered(row[0], row[1:].astype(int), above)
    return image


def unfiltered(method: int, row: np.ndarray, above: np.ndarray) -> np.ndarray:
    if method == 2:
        return (row + above) % 256
    out = row.copy()
    for x in range(len(row)):
        a, b, c = (out[x - 1], above[x], above[x - 1]) if x else (0, above[x], 0)
        paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
        out[x] = (row[x] + [0, a, b, (a + b) // 2, paeth][method]) % 256
    return out


MARGIN, CELL, ZOOM, LINE, LETTER = 12, 52, 6, 20, 12


def letters(image: np.ndarray, top: int, count: int) -> list[bytes]:
    """The ink of the first `count` characters of the line of text at `top`."""
    return [(image[top:top + 14, MARGIN + i * LETTER:MARGIN + (i + 1) * LETTER] < 64).tobytes() for i in range(count)]


def test_picture(tmp_path):
    names = ["FLASH_ATTN", "TORCH_SDPA"]
    result = digits(tmp_path, *flags(names), "--count", 23, "--steps", 2, "--out", "p.png", "--samples", "s.safetensors")
    assert result.returncode == 0, result.stderr
    image = read_grey_png(tmp_path / "p.png")
    block = 3 * LINE + 3 * CELL + MARGIN  # 23 samples: three of the classes 0, 1, 2
    assert image.shape == (MARGIN + 2 * block, 2 * MARGIN + 10 * CELL - 4)

    seen = {}
    for index, name in enumerate(names):
        top = MARGIN + index * block
        for character, picture in zip(name, letters(image, top, len(name))):
            assert any(picture), (name, character)
            assert seen.setdefault(character, picture) == picture, (name, character)
        assert any(letters(image, top + LINE, 1)[0]) == (index == 1)  # the difference, beside the second only
        for digit in range(10):
            left = MARGIN + digit * CELL
            assert (image[top + 2 * LINE:top + 2 * LINE + 14, left:left + CELL] < 64).any(), (name, digit)
        tensors = load_file(tmp_path / f"s-{name}.safetensors")
        for i, sample in enumerate(tensors["samples"]):
            y, x = top + 3 * LINE + i // 10 * CELL, MARGIN + i % 10 * CELL
            shown = image[y:y + 8 * ZOOM, x:x + 8 * ZOOM]
            expected = np.kron(255 - 255 * sample / 16, np.ones((ZOOM, ZOOM)))
            assert np.abs(shown - expected).max() <= 0.51, (name, i)
    assert len(set(seen.values())) == len(seen)  # no two characters look alike
    assert "MAX DIFF" in result.stdout


# --- bad input ---------------------------------------------------------------------------------------------------

SMALL = ("--backend", "FLASH_ATTN", "--count", 1, "--steps", 1)


def assert_refused(folder: Path, status: int, words: list[str], *args, **more) -> None:
    """The program ends with `status`, says every one of `words` on stderr, and leaves the folder as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = digits(folder, *args, **more)
    assert result.returncode == status, (result.returncode, result.stderr)
    for word in words:
        assert word in result.stderr, (word, result.stderr)
    assert result.stdout == ""
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("args, words", [
    (("--backend", "nope"), ["Unknown diffusion attention backend: 'NOPE'. Valid options are: FLASH_ATTN, TORCH_SDPA, "
                             "SAGE_ATTN, SAGE_ATTN_3, CUDNN_ATTN, FLASHINFER_ATTN, CUSTOM"]),
    (("--backend", ""), ["Unknown diffusion attention backend: ''"]),
    (("--count", 0), ["--count"]),
    (("--count", "many"), ["--count"]),
    (("--steps", 0), ["--steps"]),
    (("--guidance", "nan"), ["--guidance"]),
    (("--seed", -1), ["--seed"]),
    (("--seed", 1, "--noise", REFERENCE), ["--noise", "--seed"]),
    (("--colour",), ["--colour"]),
    (("surplus",), ["surplus"]),
])
def test_wrong_usage(tmp_path, args, words):
    assert_refused(tmp_path, 2, words, *args)


def test_wrong_thread_count(tmp_path):
    assert_refused(tmp_path, 2, ["DITATTN_NUM_THREADS", "x"], *SMALL, env=os.environ | {"DITATTN_NUM_THREADS": "x"})


def test_refused_backends(tmp_path, refusals):
    for name, (status, _) in refusals.items():
        assert_refused(tmp_path, status, ["digits: error: "], *flags(["FLASH_ATTN", name]), "--count", 1, "--steps", 1)
    assert_refused(tmp_path, 3, ["Backend CUSTOM must be registered before use."], "--backend", "CUSTOM")


def altered_weights(file: Path, change) -> Path:
    """The shipped weights with another header: `change` gets it as a dictionary."""
    raw = (HERE / "digits.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    return file


@pytest.mark.parametrize("change, words", [
    (lambda h: h["pos"].update(shape=[192, 64]), ["'pos' has shape (192, 64), expected (64, 192)"]),
    (lambda h: h["blocks.5.fc2.weight"].update(shape=[192 * 768]), ["'blocks.5.fc2.weight' has shape (147456,)"]),
    (lambda h: h.update(extra=h.pop("head.bias")), ["'head.bias' is missing"]),
    (lambda h: h["__metadata__"].update(blocks="5"), ["'blocks.5.", "not part of this model"]),
    (lambda h: h["__metadata__"].update(blocks="7"), ["'blocks.6.table' is missing"]),
    (lambda h: h["__metadata__"].update(heads="5"), ["dim=192", "heads=5"]),
    (lambda h: h["__metadata__"].update(dim="-192"), ["dim='-192'"]),
    (lambda h: h["__metadata__"].update(mlp_dim="99999999999999999999"), ["mlp_dim='99999999999999999999'"]),
    (lambda h: h["__metadata__"].pop("classes"), ["no 'classes'"]),
])
def test_weights_of_another_model(tmp_path, change, words):
    file = altered_weights(tmp_path / "w.safetensors", change)
    assert_refused(tmp_path, 4, ["w.safetensors", *words], *SMALL, "--weights", file)


def test_weights_of_another_dtype(tmp_path):
    with safe_open(HERE / "digits.safetensors", "numpy") as file:
        metadata, shapes = file.metadata(), {name: file.get_slice(name).get_shape() for name in file.keys()}
    tensors = {name: np.zeros(shape, np.int32 if name == "pos" else np.float16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "w.safetensors", metadata)
    assert_refused(tmp_path, 4, ["'pos' is int32"], *SMALL, "--weights", "w.safetensors")


def test_weights_that_are_no_file_or_damaged(tmp_path):
    assert_refused(tmp_path, 4, ["gone.safetensors", "no such file"], *SMALL, "--weights", "gone.safetensors")
    whole = (HERE / "digits.safetensors").read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 1000):
        (tmp_path / "w.safetensors").write_bytes(damaged)
        assert_refused(tmp_path, 4, ["w.safetensors"], *SMALL, "--weights", "w.safetensors")


NOISE = np.zeros((2, 8, 8), np.float32)
LABELS = np.arange(2)


@pytest.mark.parametrize("tensors, words", [
    ({"noise": NOISE}, ["'labels' is missing"]),
    ({"labels": LABELS}, ["'noise' is missing"]),
    ({"noise": NOISE.reshape(2, 64), "labels": LABELS}, ["'noise' has shape (2, 64)", "(N, 8, 8)"]),
    ({"noise": NOISE.astype(np.float64), "labels": LABELS}, ["'noise' is float64, expected float32"]),
    ({"noise": NOISE, "labels": np.arange(3)}, ["2 images and 3 labels"]),
    ({"noise": NOISE[:0], "labels": LABELS[:0]}, ["0 images"]),
    ({"noise": NOISE, "labels": LABELS + 9}, ["class 10", "0 to 9"]),
    ({"noise": NOISE, "labels": LABELS - 1}, ["class -1", "0 to 9"]),
    ({"noise": NOISE + np.inf, "labels": LABELS}, ["infinite"]),
])
def test_bad_noise(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "n.safetensors")
    assert_refused(tmp_path, 4, ["n.safetensors", *words], "--backend", "FLASH_ATTN", "--noise", "n.safetensors")


def test_more_samples_than_noise(tmp_path):
    assert_refused(tmp_path, 4, ["10 images"], "--backend", "FLASH_ATTN", "--noise", REFERENCE, "--count", 11)


@pytest.mark.parametrize("flag", ["--out", "--samples", "--capture"])
def test_output_that_cannot_be_written(tmp_path, flag):
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path, 4, ["gone/x", "no such directory"], *SMALL, flag, "gone/x")
    assert_refused(tmp_path, 4, ["folder", "is a directory"], *SMALL, flag, "folder")


def test_picture_that_does_not_fit_the_disk(tmp_path):
    (tmp_path / "p.png").write_bytes(b"kept")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # noqa: E731
    before = (tmp_path / "p.png").read_bytes()
    result = digits(tmp_path, *SMALL, "--out", "p.png", preexec_fn=limit, restore_signals=False)
    assert result.returncode == 4 and "p.png" in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    assert (tmp_path / "p.png").read_bytes() == before
