"""From image bytes to training pixels: decoding, augmentation, and the views of a batch."""
