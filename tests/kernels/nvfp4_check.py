"""Compares kernels/nvfp4.hpp with ml_dtypes: every code's number, and what every float16 number becomes.

nvfp4_check.py NVFP4_TABLE   (the program that writes the table)
"""

import subprocess
import sys

import ml_dtypes
import numpy as np

lines = subprocess.run([sys.argv[1]], check=True, capture_output=True, text=True).stdout.split()
table = np.array(lines, dtype=np.int64).reshape(-1, 3)
assert len(table) == 65536, f"{len(table)} lines"
numbers = table[:, 0].astype(np.uint16).view(np.float16).astype(np.float32)
failures = 0
for column, name, dtype, most in (
    (1, "e2m1", ml_dtypes.float4_e2m1fn, 6.0),
    (2, "e4m3", ml_dtypes.float8_e4m3fn, 448.0),
):
    # Beyond the largest ml_dtypes gives NaN, or what it likes; ours is the largest. e2m1 has no NaN.
    finite = ~np.isnan(numbers)
    expected = np.clip(numbers[finite], -most, most).astype(dtype).astype(np.float32)
    ours = table[finite, column].astype(np.uint8).view(dtype).astype(np.float32)
    wrong = (ours != expected) | (np.signbit(ours) != np.signbit(expected))
    for x, got, wanted in list(zip(numbers[finite][wrong], ours[wrong], expected[wrong]))[:10]:
        print(f"{name}: {x} becomes {got}, not {wanted}")
    failures += int(wrong.sum())
    print(f"{name}: {int(finite.sum())} numbers, {int(wrong.sum())} differ from ml_dtypes {ml_dtypes.__version__}")
sys.exit(1 if failures else 0)
