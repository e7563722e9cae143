"""Do generated digits show what was asked for?

Fits a scikit-learn classifier on the real digits and lets it read the samples of a
safetensors file: `samples`, float32 (N, 8, 8) in 0..16, and `labels`, int64 (N,).
Agreement alone could be had by copying, or by drawing one perfect digit per class, so
two distances go with it, each beside its value on real digits.

    python score.py samples.safetensors --min-agreement 0.95
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC


def same_class_distances(a: np.ndarray, ya: np.ndarray,
                         b: np.ndarray, yb: np.ndarray) -> np.ndarray:
    """Euclidean distances between images of one class; nan elsewhere and to itself."""
    distances = pairwise_distances(a, b)
    distances[ya[:, None] != yb] = np.nan
    if a is b:
        np.fill_diagonal(distances, np.nan)
    return distances


def record(weights: Path, quality: str) -> None:
    """Note the measured quality in the metadata of a safetensors file."""
    raw = weights.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header.setdefault("__metadata__", {})["measured_quality"] = quality.replace("\n", "; ")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    weights.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path)
    parser.add_argument("--min-agreement", type=float, default=0.95)
    parser.add_argument("--record", type=Path, metavar="WEIGHTS",
                        help="write the result into this file's metadata")
    args = parser.parse_args()

    images, digits = load_digits(return_X_y=True)
    fit_x, test_x, fit_y, test_y = train_test_split(
        images, digits, test_size=0.25, random_state=0, stratify=digits)
    classifier = SVC(kernel="rbf", gamma=0.001, C=10).fit(fit_x, fit_y)

    with safe_open(args.samples, "numpy") as file:
        labels = file.get_tensor("labels")
        samples = file.get_tensor("samples").reshape(len(labels), -1)
        settings = file.metadata() or {}
    right = classifier.predict(samples) == labels
    to_real = same_class_distances(samples, labels, images, digits)
    real_to_real = same_class_distances(images, digits, images, digits)
    among = same_class_distances(samples, labels, samples, labels)
    quality = "\n".join([
        "sampler: " + " ".join(f"{key}={settings[key]}" for key in sorted(settings)),
        f"agreement: {right.mean():.4f} of {len(labels)} samples",
        "agreement by class: " + " ".join(f"{right[labels == c].mean():.3f}" for c in range(10)),
        f"classifier: RBF SVC, held-out accuracy {classifier.score(test_x, test_y):.4f}",
        f"median distance to the nearest real digit: {np.median(np.nanmin(to_real, 1)):.1f} "
        f"(between real digits {np.median(np.nanmin(real_to_real, 1)):.1f})",
        f"mean distance within a class: {np.nanmean(among):.1f} "
        f"(between real digits {np.nanmean(real_to_real):.1f})"])
    print(quality)
    if args.record:
        record(args.record, quality)
    return int(right.mean() < args.min_agreement)


if __name__ == "__main__":
    sys.exit(main())
