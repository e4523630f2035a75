"""Image bytes to training pixels: decoding, augmentation, the views of a batch."""
