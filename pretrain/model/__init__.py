"""The alignment model: an image encoder, a text encoder, and a fusion encoder that reads both."""
